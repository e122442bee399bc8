"""Operators of com.microsoft, and of ONNX Runtime alone, as the standard ones that do the same (opset 23)."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.nodes import MICROSOFT, kind, number, operand, result, said
from vlmtrim.graphs.ops import Ops


def check_unpacked(model: ir.Model) -> None:
    """Raise GraphError where products read weights of fewer bits that only ONNX Runtime unpacks."""
    for node in model.graph:
        if kind(node) in _PACKED:
            raise GraphError(
                f"expected weights in float; found {said(node)}, which reads them in fewer bits, as none of the "
                "contract's formats has them: give the graph in float, or leave it out and pack the checkpoint's "
                "weights (export-vlm --weights int4)"
            )


def standardise(model: ir.Model) -> None:
    """Rewrite them in place. Raises GraphError naming an operator that has no such form here."""
    check_unpacked(model)
    for node in list(model.graph):
        rewrite = _FORMS.get(kind(node))
        if rewrite is None:
            if kind(node)[0] != "":
                raise GraphError(
                    f"expected operators of the standard domain, or norms and rotary embeddings; found {said(node)}"
                )
            continue
        ops = Ops(f"standard/{node.name or node.outputs[0].name}")
        replaced = rewrite(ops, node)
        for old, new in replaced.items():
            new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        model.graph.insert_before(node, ops.nodes)
        model.graph.remove(node, safe=True)
    model.functions.clear()
    model.opset_imports.pop(MICROSOFT, None)


def _norm(ops: Ops, node: ir.Node) -> dict[ir.Value, ir.Value]:
    """SimplifiedLayerNormalization, which ONNX Runtime knows in the standard domain."""
    return {node.outputs[0]: _normed(ops, node, node.inputs[0], node.inputs[1])}


def _skip_rms_norm(ops: Ops, node: ir.Node) -> dict[ir.Value, ir.Value]:
    """SkipSimplifiedLayerNormalization: the RMS norm of a sum, and the sum."""
    total, found = _summed(ops, node, 3)
    return {node.outputs[0]: _normed(ops, node, total, node.inputs[2]), **found}


def _skip_norm(ops: Ops, node: ir.Node) -> dict[ir.Value, ir.Value]:
    """SkipLayerNormalization: the norm of a sum, and the sum."""
    total, found = _summed(ops, node, 4)
    settings = {"axis": -1, "epsilon": number(node, "epsilon", 1e-12)}
    return {node.outputs[0]: ops("LayerNormalization", total, node.inputs[2], operand(node, 3), **settings), **found}


def _summed(ops: Ops, node: ir.Node, bias: int) -> tuple[ir.Value, dict[ir.Value, ir.Value]]:
    """The sum that such a node norms, with the input numbered ``bias``, and as its output where it has that."""
    total = ops("Add", node.inputs[0], node.inputs[1])
    total.type, total.shape = node.outputs[0].type, node.outputs[0].shape
    if (added := operand(node, bias)) is not None:
        total = ops("Add", total, added)
    for at in (1, 2):
        if (value := result(node, at)) is not None and list(value.uses()):
            raise GraphError(
                f"expected nobody to read mean and deviation of {said(node)}; found a reader of {value.name}"
            )
    sum_ = result(node, 3)
    return total, {} if sum_ is None else {sum_: total}


def _normed(ops: Ops, node: ir.Node, value: ir.Value | None, weight: ir.Value | None) -> ir.Value:
    settings = {"axis": -1, "epsilon": number(node, "epsilon", 1e-5), "stash_type": 1}
    return ops("RMSNormalization", value, weight, **settings)


def _rotary(ops: Ops, node: ir.Node) -> dict[ir.Value, ir.Value]:
    """com.microsoft.RotaryEmbedding: the tables gathered at the positions first."""
    if number(node, "scale", 1.0) != 1 or number(node, "is_packed_batching", 0):
        raise GraphError(f"expected scale=1 and is_packed_batching=0 of {said(node)}; found others")
    value, positions, *tables = node.inputs
    cos, sin = (ops("Gather", table, positions) for table in tables)
    names = ("num_heads", "rotary_embedding_dim", "interleaved")
    settings = {name: int(number(node, name, 0)) for name in names}
    return {node.outputs[0]: ops("RotaryEmbedding", value, cos, sin, **settings)}


_PACKED = {(MICROSOFT, name) for name in ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE")}
_FORMS: dict[tuple[str, str], Callable[[Ops, ir.Node], dict[ir.Value, ir.Value]]] = {
    ("", "SimplifiedLayerNormalization"): _norm,
    (MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    (MICROSOFT, "RotaryEmbedding"): _rotary,
}
