"""Lets some layers of a float16 decoder compute in float32, where their values leave float16's range."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input, seam_before
from vlmtrim.graphs.surgery.region import downstream, reads_dtype

NARROW, WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT
Casts = dict[tuple[ir.Value, ir.DataType], ir.Value]
# Caches stay as the contract has them, and so does what only cuts them, or gathers their entries.
_OF_CACHES = {"TensorScatter", "Slice", "Identity", "GatherND"}


def wide_layers(model: ir.Model, indices: Sequence[int]) -> None:
    """Compute whole layers, from residual stream to residual stream, in float32, in place.

    What enters a layer is cast, weights included; what leaves it is cast back, and so is what its caches take and its
    attention reads: sums of values under a softmax stay in range, and TensorRT-RTX 1.7 does not build attention that
    reads caches of another dtype. Weights stay stored as they are.

    Args:
        model: a decoder in float16, with its selection or without.
        indices: of layers, 0 to layers - 1.

    Raises:
        GraphError: a layer that the decoder does not have, or one that holds a selection in a Loop.
    """
    layers = find_layers(model)
    for index in indices:
        if not 0 <= index < len(layers):
            raise GraphError(f"--fp32-layers names layer {index}; the decoder has layers 0 to {len(layers) - 1}")
    ShapeInferencePass()(model)  # what a method inserted has no types yet
    casts: Casts = {}  # of all runs: what several read is cast once
    for first, last in _runs(sorted(set(indices))):
        layers = find_layers(model)
        region = _between(model, layers, first, last)
        if any(node.op_type == "Loop" for node in region):
            raise GraphError(
                f"--fp32-layers names layers {first} to {last}, which the selection's Loop reads; name layers behind "
                "the selection, or give a --score that picks all at once"
            )
        _widen(model, region, casts)


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive numbers."""
    for _, group in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield numbers[0], numbers[-1]


def _between(model: ir.Model, layers: list[Layer], first: int, last: int) -> list[ir.Node]:
    """The nodes of layers ``first`` to ``last``, in order, and of the logits where the last layer is among them."""
    start = seam_before(model, layers, first) if first else graph_input(model, "inputs_embeds")
    behind = set() if last + 1 == len(layers) else _contents(seam_before(model, layers, last + 1))
    inside = _contents(start) - behind
    return [node for node in model.graph if node in inside]


def _contents(value: ir.Value) -> set[ir.Node]:
    """Nodes that depend on what a value holds, not on its shape or dtype alone."""
    return downstream(value, lambda _, node, index: node.op_type == "Shape" or reads_dtype(node, index))


def _widen(model: ir.Model, region: list[ir.Node], casts: Casts) -> None:
    inside = set(region)
    narrow: set[ir.Value] = {value for value in model.graph.inputs if value.dtype == NARROW}
    wide: list[ir.Value] = []
    for node in region:
        of_caches = node.op_type in _OF_CACHES and node.inputs[0] in narrow and "past" in _root(node.inputs[0])
        if of_caches or node.op_type == "Attention":
            narrow.update(node.outputs)
            continue
        if node.op_type == "Cast" and node.attributes.get_int("to") == NARROW:
            node.attributes["to"] = ir.AttrInt64("to", int(WIDE))
        for value in node.outputs:
            if value.dtype == NARROW:
                value.type = ir.TensorType(WIDE)  # a new one: clones of a graph share theirs
                wide.append(value)
    for node in region:
        keeps = bool(node.outputs) and node.outputs[0] in narrow
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != (WIDE if keeps else NARROW) or node.op_type == "Shape":
                continue
            node.replace_input_with(index, _cast(model, value, NARROW if keeps else WIDE, casts))
    for value in wide:
        outside = [(node, index) for node, index in value.uses() if node not in inside and node.op_type != "Cast"]
        for node, index in outside:
            node.replace_input_with(index, _cast(model, value, NARROW, casts))
        if value in model.graph.outputs:
            back = _cast(model, value, NARROW, casts)
            name = value.name
            value.name, back.name = f"{name}/wide", name
            model.graph.outputs[model.graph.outputs.index(value)] = back
    model.graph.sort()


def _root(value: ir.Value | None) -> str:
    """Name of what a chain of cache operators begins with."""
    while value is not None and value.producer() is not None:
        value = value.producer().inputs[0]  # type: ignore[union-attr]
    return "" if value is None else str(value.name)


def _cast(model: ir.Model, value: ir.Value, dtype: ir.DataType, casts: Casts) -> ir.Value:
    key = value, dtype
    if key not in casts:
        suffix = "wide" if dtype == WIDE else "narrow"
        node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}/{suffix}_cast")
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{value.name}/{suffix}_cast", ir.TensorType(dtype), value.shape
        producer = value.producer()
        if producer is None:
            model.graph.insert_before(model.graph[0], node)
        else:
            model.graph.insert_after(producer, node)
        casts[key] = made
    return casts[key]
