"""Exporters write opset 13 to 24: nodes of the selection in the spelling of older ones, older graphs in a later one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.nodes import constant, kind, said
from vlmtrim.graphs.ops import Ops

OLDEST = 13
OPSET = 24  # of every graph of a bundle, for TensorScatter
_AXES_AS_INPUT = 18  # of ReduceMean, ReduceMax and their kin, and the opset of Split's num_outputs
_SHAPE_OF_PART = 15  # of Shape's start and end, and of CastLike
_REDUCED = frozenset({"ReduceMean", "ReduceMax", "ReduceMin"})
# Later versions of other operators add types, and attributes and inputs that do nothing where they are left out.
_REDEFINED = frozenset({"Attention", "BatchNormalization", "GridSample", "GroupNormalization", "Resize", "Upsample"})
_REDEFINED_BY = 23  # an Attention of 23 without nonpad_kv_seqlen is one of 24
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


def raised(model: ir.Model, opset: int) -> None:
    """Rewrite a graph of an older opset in place. Raises GraphError naming an operator that means something else."""
    old = opset_of(model)
    for node in list(model.graph) if old < opset else ():
        if kind(node)[0] != "":
            continue
        if node.op_type.startswith("Reduce") and "axes" in node.attributes:
            ops = Ops(f"raised/{node.name or node.outputs[0].name}")
            axes = ops.const(list(node.attributes.pop("axes").as_ints()), np.int64)
            model.graph.insert_before(node, ops.nodes)
            node.resize_inputs(2)
            node.replace_input_with(1, axes)
        elif node.op_type == "Split" and len(node.inputs) == 1:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        elif node.op_type in _REDEFINED and old < _REDEFINED_BY:
            raise GraphError(f"{said(node)} of opset {old} means something else in {opset}: export with a later one")
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports[""] = max(old, opset)
