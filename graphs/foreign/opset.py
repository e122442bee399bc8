"""Nodes of the selection in the spelling of older opsets: exporters write 13 to 24."""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.nodes import constant

OLDEST = 13
_AXES_AS_INPUT = 18  # of ReduceMean, ReduceMax and their kin, and the opset of Split's num_outputs
_SHAPE_OF_PART = 15  # of Shape's start and end, and of CastLike
_REDUCED = frozenset({"ReduceMean", "ReduceMax", "ReduceMin"})
_LATER = {"RotaryEmbedding": 23, "RMSNormalization": 23, "Attention": 23, "CastLike": 15}


def opset_of(model: ir.Model) -> int:
    """The version of the standard operators. Raises GraphError below what the selection can be spelled in."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if version < OLDEST:
        raise GraphError(
            f"expected opset {OLDEST} or later; found {version}: convert the decoder first (onnx.version_converter)"
        )
    return version


def spelled(node: ir.Node, opset: int) -> None:
    """Rewrite in place what that opset does not know of a node in a graph."""
    if node.domain == "" and opset < _LATER.get(node.op_type, 0):
        raise GraphError(f"the selection needs {node.op_type} here, of opset {_LATER[node.op_type]}; found {opset}")
    if opset < _AXES_AS_INPUT and node.op_type in _REDUCED and len(node.inputs) > 1:
        axes = constant(node.inputs[1])
        assert axes is not None
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.tolist())
        node.resize_inputs(1)
    if opset < _AXES_AS_INPUT and node.op_type == "Split":
        node.attributes.pop("num_outputs", None)
    if opset < _SHAPE_OF_PART and node.op_type == "Shape":
        _part_of_shape(node)


def _part_of_shape(node: ir.Node) -> None:
    """A range of a shape's axes as a Slice of the whole shape."""
    bounds = [node.attributes.pop(name, None) for name in ("start", "end")]
    if bounds == [None, None]:
        return
    old, whole = node.outputs[0], ir.node("Shape", [node.inputs[0]], name=f"{node.name}/whole")
    parts = [whole]
    for bound, default in zip(bounds, (0, 2**31 - 1), strict=True):
        value = default if bound is None else bound.as_int()
        parts.append(ir.node("Constant", [], attributes={"value_ints": [value]}, name=f"{node.name}/bound"))
    cut = ir.node("Slice", [part.outputs[0] for part in parts], name=f"{node.name}/part")
    for number, part in enumerate((*parts, cut)):
        part.outputs[0].name = f"{old.name}/part{number}"
    graph = node.graph
    assert graph is not None
    graph.insert_after(node, [*parts, cut])
    old.replace_all_uses_with(cut.outputs[0])
    graph.remove(node, safe=True)
