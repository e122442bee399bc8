"""Cuts a decoder into graphs of consecutive layers, so that each can become an engine of its own.

The graphs form a chain: what one returns under a name, a later one takes under the same name. Building an engine needs
about 3.2 times its weights in memory, so a model that is too large in one piece is built in several.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.lint import boundary
from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input, graph_output, seam_before
from vlmtrim.graphs.surgery.region import downstream, reads_dtype

HIDDEN = "hidden_states"


def boundaries(layers: int, shards: int, tail: float = 0.0) -> list[int]:
    """First layers of shards 1, 2, ... such that the largest shard is as small as can be.

    Args:
        layers: number of layers, all of the same size.
        shards: number of shards, 1 to ``layers``.
        tail: size of what follows the last layer (norm, logits), in layers.
    """
    if not 1 <= shards <= layers:
        raise GraphError(f"{layers} layers cannot be cut into {shards} shards: give 1 to {layers}")

    def before_tail(size: float) -> int:
        return int(size - tail + 1e-9)

    sizes = sorted({size for n in range(1, layers + 1) for size in (n, n + tail) if before_tail(size) >= 1})
    size = next(size for size in sizes if int(size) * (shards - 1) + before_tail(size) >= layers)
    last = min(before_tail(size), layers - shards + 1)
    starts, start = [], 0
    for remaining in range(shards - 1, 0, -1):
        start += -(-(layers - last - start) // remaining)
        starts.append(start)
    return starts


def cut(model: ir.Model, starts: Sequence[int]) -> list[ir.Model]:
    """The decoder as a chain of graphs; shard i begins with layer ``starts[i - 1]``, the first with layer 0.

    What crosses a cut are the hidden states [B, S or Sk, D] (``hidden_states.<layer>``) and, behind a selection,
    vectors as long as the sequence, such as the positions that survived, or the numbers of the kept image features.
    Masks, rotary tables and shapes are computed again in every shard, and kept image features gathered again. Weights
    stay references to the same files. The model itself is left as it is.

    Raises:
        GraphError: a shard would need something else of an earlier one; the message names the value.
    """
    model = model.clone()
    layers = find_layers(model)
    named = {dim for value in _values(model) for dim in value.shape or ()}  # before inference makes up names
    if any(value.type is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)  # ranks tell what may cross
    seams = [seam_before(model, layers, start) for start in starts]
    for start, seam in zip(starts, seams, strict=True):
        seam.name = f"{HIDDEN}.{start}"
    edges = [0, *starts, len(layers)]
    behind = [_behind(seam, layers[start:]) for start, seam in zip(starts, seams, strict=True)]
    needs = [_Needs(model, seam, nodes, named) for seam, nodes in zip(seams, behind, strict=True)]
    crossing = list(dict.fromkeys(value for need in needs for value in need.small))
    shards = []
    for index in range(len(edges) - 1):
        first, last = edges[index], edges[index + 1]
        inside = [set(model.graph), *behind, set()][index] - [*behind, set()][index]
        outputs = seams[index : index + 1]
        outputs += [v for v in model.graph.outputs if v.producer() in inside]
        outputs += [v for v in crossing if v.producer() in inside and v not in outputs]
        need = needs[index - 1] if index else None
        shards.append(_extract(model, seams[index - 1] if index else None, need, outputs, layers[first:last]))
    return shards


def picks_one_by_one(model: ir.Model) -> bool:
    """Whether the selection is a Loop: TensorRT-RTX 1.7 crashes on a graph that gathers a layer's states by its result,
    and builds the two apart."""
    return any(node.op_type == "Loop" for node in model.graph)


def selection_apart(model: ir.Model) -> tuple[ir.Model, ir.Model]:
    """(what computes ``kept_indices`` and ``visual_scores``, the decoder that takes ``kept_indices``); the model itself
    is left as it is."""
    chosen = ("kept_indices", "visual_scores")
    alone, rest = model.clone(), model.clone()
    alone.graph.outputs[:] = [graph_output(alone, name) for name in chosen]
    kept = graph_output(rest, "kept_indices")
    rest.graph.outputs[:] = [value for value in rest.graph.outputs if value.name not in chosen]
    entry = ir.val("kept_indices", type=kept.type, shape=kept.shape)
    kept.replace_all_uses_with(entry)
    kept.name = "kept_indices/before"
    rest.graph.inputs.insert(0, entry)
    return _without_unused(alone), _without_unused(rest)


def specs(shards: Sequence[ir.Model], stem: str) -> list[GraphSpec]:
    """Boundaries of a chain, for the contract; files are ``<stem>-<number>.onnx``."""
    return [GraphSpec(f"{stem}-{index}.onnx", *boundary(shard)) for index, shard in enumerate(shards)]


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


class _Needs:
    """What the part of a decoder behind a seam (the nodes ``behind``) reads of the part before it."""

    def __init__(self, model: ir.Model, seam: ir.Value, behind: set[ir.Node], named: set[int | ir.SymbolicDim]):
        self.small: list[ir.Value] = []
        self.shapes: list[ir.Node] = []
        contents = _contents(model, seam)
        region = behind & contents
        seen: set[ir.Value] = {seam}
        stack = [v for node in model.graph if node in region for v in node.inputs if v is not None]
        while stack:
            value = stack.pop()
            node = value.producer()
            if value in seen or node is None or node in region:
                continue
            seen.add(value)
            if node in contents and _may_cross(value, named):
                self.small.append(value)
            elif node in contents and node.op_type in ("MatMul", "Attention", "TensorScatter", "Gemm"):
                raise GraphError(
                    f"a cut at {seam.name} fails: {value.name} ({node.op_type}) is computed before it and read "
                    "behind it; give fewer --engine-shards"
                )
            elif node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].shape == seam.shape:
                self.shapes.append(node)
            else:
                stack.extend(v for v in node.inputs if v is not None)


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]


def _may_cross(value: ir.Value, named: set[int | ir.SymbolicDim]) -> bool:
    """Whether it is a vector as long as something that has a name, which limits of engines are given for, or one a key
    head as long as the window; a shape, of known length, is put together anew instead."""
    if value.shape is None or all(isinstance(dim, int) for dim in value.shape):
        return False
    if len(value.shape) > 2 and not (len(value.shape) == 3 and str(value.shape[2]).startswith("W")):
        return False
    return all(dim in named for dim in value.shape)


def _contents(model: ir.Model, seam: ir.Value) -> set[ir.Node]:
    """Nodes whose values cannot be had behind a seam without what is before it.

    They depend on what the tokens are, or on how many there were before a selection; how many there are at the seam
    is known behind it too.
    """

    def ignored(value: ir.Value, node: ir.Node, index: int) -> bool:
        return (node.op_type == "Shape" and value.shape == seam.shape) or reads_dtype(node, index)

    return downstream(graph_input(model, "inputs_embeds"), ignored)


def _behind(seam: ir.Value, layers: Sequence[Layer]) -> set[ir.Node]:
    """What depends on a seam, and the keys and values of image features that only ``layers``, behind it, read."""
    found = downstream(seam)
    stack = [value for layer in layers for value in (layer.key, layer.value)]
    while stack:
        node = stack.pop().producer()
        if node is None or node in found:
            continue
        if all(user in found for value in node.outputs for user, _ in value.uses()):
            found.add(node)
            stack.extend(value for value in node.inputs if value is not None)
    return found


def _extract(
    model: ir.Model, seam: ir.Value | None, need: _Needs | None, outputs: list[ir.Value], layers: list[Layer]
) -> ir.Model:
    shard = model.clone()
    graph = shard.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    graph.outputs[:] = [values[value.name] for value in outputs]
    if seam is not None and need is not None:
        entering = []
        for value in (seam, *need.small):
            old = values[value.name]
            entry = ir.val(str(value.name), type=value.type, shape=value.shape)
            old.replace_all_uses_with(entry)
            old.name = f"{value.name}/before"
            entering.append(entry)
        for node in need.shapes:
            _read_shape_of(values[node.outputs[0].name].producer(), entering[0])
        graph.inputs[:0] = entering
    _without_unused(shard)
    found = sum(node.op_type == "Attention" for node in graph)
    if found != len(layers):
        raise GraphError(
            f"the shard of layers {layers[0].index} to {layers[-1].index} holds {found} Attention nodes instead of "
            f"{len(layers)}: layers depend on each other in a way that cannot be cut; give --engine-shards 1"
        )
    return shard


def _without_unused(model: ir.Model) -> ir.Model:
    RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)
    model.graph.sort()
    return model


def _read_shape_of(node: ir.Node | None, hidden: ir.Value) -> None:
    """Let a Shape of earlier token states read the hidden states that enter, which have the same sizes."""
    assert node is not None and node.inputs[0] is not None
    if node.inputs[0].shape == hidden.shape:
        node.replace_input_with(0, hidden)
