"""The last attention layer of a vision graph: what it pays to every patch, and the states that it leaves.

Shapes: I pictures, H heads, P patches, T tokens of the tower, P or P + 1 with a class token before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import before_scaling


@dataclass(frozen=True)
class LastAttention:
    """Its node, its keys [I, H, T, Dh], and whether the first of its T tokens is a class token."""

    node: ir.Node
    key: ir.Value
    has_class: bool


def last_attention(model: ir.Model, patches: int) -> LastAttention:
    """The last attention of a vision graph, which is sorted by this.

    Raises:
        GraphError: there is none, or it is not over P tokens, or P and a class token before them.
    """
    model.graph.sort()
    node = next((node for node in reversed(model.graph) if node.op_type == "Attention"), None)
    if node is None:
        raise GraphError("the vision graph has no Attention node, whose probabilities could rank patches")
    query, key = node.inputs[:2]
    assert query is not None and key is not None
    if query.shape is None:
        ShapeInferencePass()(model)
    tokens = None if query.shape is None or len(query.shape) != 4 else query.shape[2]
    if tokens not in (patches, patches + 1):
        raise GraphError(f"the last attention of the vision graph is over {query.shape}; expected {patches} tokens")
    return LastAttention(node, key, tokens == patches + 1)


def paid(ops: Ops, last: LastAttention, patches: int) -> ir.Value:
    """Attention that every patch is paid, float32 [I, P], mean over heads.

    From the class token; where the tower has none, from all patches, mean over them.
    """
    query, factor = before_scaling(last.node.inputs[0])  # type: ignore[arg-type]
    if last.has_class:
        query = ops.slice(query, ops.const([0]), ops.const([1]), axis=2)
    if factor is not None:
        query = ops("Mul", query, factor)
    logits = ops("Cast", ops("MatMul", query, ops("Transpose", last.key, perm=[0, 1, 3, 2])), to=ir.DataType.FLOAT)
    scale = last.node.attributes.get("scale")
    size = query.shape[3] if query.shape is not None else None
    scale = scale.as_float() if scale is not None else float(size) ** -0.5  # type: ignore[arg-type]
    if scale != 1.0:
        logits = ops("Mul", logits, ops.const(scale, np.float32))
    found = ops("ReduceMean", ops("Softmax", logits, axis=-1), ops.const([1, 2]), keepdims=0)  # [I, T]
    return ops.slice(found, ops.const([1]), ops.const([patches + 1]), axis=1) if last.has_class else found


def features_seam(model: ir.Model, last: LastAttention) -> tuple[ir.Value, ir.Value]:
    """(states [I, T, Dv] that the tower's last layer leaves, what of them becomes features [I, P, Dv]).

    Raises:
        GraphError: features are made of more than these states.
    """
    behind = list(model.graph)[list(model.graph).index(last.node) :]
    for norm in (node for node in reversed(behind) if node.op_type in ("LayerNormalization", "RMSNormalization")):
        entered = norm.inputs[0]
        assert entered is not None
        added = [use for use in entered.consumers() if use.op_type == "Add"]  # the residual connection
        if added:
            states = added[0].outputs[0]
            break
    else:
        raise GraphError("the vision graph's last layer has no norm before its MLP; its states are not found")
    readers = list(states.consumers())
    if not last.has_class and len(readers) == 1:
        return states, states
    if last.has_class and len(readers) == 1 and readers[0].op_type == "Slice":
        return states, readers[0].outputs[0]
    raise GraphError(
        f"the states of the vision graph's last layer are read by {', '.join(node.op_type for node in readers)}; "
        "expected features of this layer alone"
    )
