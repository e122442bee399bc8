"""The vision graph also returns how much attention its last layer pays to every patch.

From its class token (FasterVLM, arXiv 2412.01818; VisionZip, arXiv 2412.04467); where the tower has none, from all
patches. Shapes: I pictures, H heads, P patches that become visual tokens, T tokens of the tower, P or P + 1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import before_scaling

OUTPUT = "visual_attention"


def vision_scores(model: ir.Model, patches: int) -> ir.Model:
    """Add the output ``visual_attention`` float32 [I, P] in place, and return the model.

    Args:
        model: vision graph with the output ``image_features`` [I, P, D] and fused Attention nodes.
        patches: P.

    Raises:
        GraphError: its last attention is not over P tokens, or P and a class token before them.
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
    ops = Ops("seen")
    query, factor = before_scaling(query)
    has_class = tokens == patches + 1
    if has_class:
        query = ops.slice(query, ops.const([0]), ops.const([1]), axis=2)
    if factor is not None:
        query = ops("Mul", query, factor)
    logits = ops("Cast", ops("MatMul", query, ops("Transpose", key, perm=[0, 1, 3, 2])), to=ir.DataType.FLOAT)
    scale = node.attributes.get("scale")
    size = query.shape[3] if query.shape is not None else None
    scale = scale.as_float() if scale is not None else float(size) ** -0.5  # type: ignore[arg-type]
    if scale != 1.0:
        logits = ops("Mul", logits, ops.const(scale, np.float32))
    paid = ops("ReduceMean", ops("Softmax", logits, axis=-1), ops.const([1, 2]), keepdims=0)  # [I, T]
    if has_class:
        paid = ops.slice(paid, ops.const([1]), ops.const([patches + 1]), axis=1)
    paid.name, paid.type, paid.shape = OUTPUT, ir.TensorType(ir.DataType.FLOAT), ir.Shape(("I", patches))
    model.graph.extend(ops.nodes)
    model.graph.outputs.append(paid)
    model.graph.sort()
    return model
