"""Splits a decoder at a selection: later layers get the survivors, caches and side inputs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.contract import DEEPSTACK, LAST_SEEN
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import Layer, graph_input
from vlmtrim.graphs.surgery.region import SideInputs, downstream
from vlmtrim.graphs.surgery.select import Survivors, gather_tokens


@dataclass(frozen=True)
class Running:
    """What a run of layers computes on, of a step's tokens or of those that a selection left.

    Attributes:
        embeds: what later layers read the sizes of, [B, S or T, D].
        positions: position ids, [B, S or T] or [3, B, S or T].
        last_index: int64 [B].
        group: number of its cache group.
        tokens: name of its dimension of tokens, S or Sk...
        rows: tokens whose queries are returned, int64 [B, R]; None where none are.
        added: what layers add to tokens' states, [B, S or T, n]; None where they add nothing.
        seen: the last token that each one attends to, int64 [B, S or T]; None where that is itself.
    """

    embeds: ir.Value
    positions: ir.Value
    last_index: ir.Value
    group: int = 0
    tokens: str = "S"
    rows: ir.Value | None = None
    added: ir.Value | None = None
    seen: ir.Value | None = None


def whole(model: ir.Model) -> Running:
    """All tokens of a step."""
    embeds, positions = graph_input(model, "inputs_embeds"), graph_input(model, "position_ids")
    named = {value.name: value for value in model.graph.inputs}
    last_index = graph_input(model, "last_index")
    rows, added, seen = (named.get(name) for name in ("score_rows", DEEPSTACK, LAST_SEEN))
    return Running(embeds, positions, last_index, rows=rows, added=added, seen=seen)


def split_at(
    model: ir.Model,
    ops: Ops,
    seam: ir.Value,
    layers: list[Layer],
    first: int,
    survivors: Survivors,
    capacity: int,
    running: Running,
    tokens: str = "Sk",
) -> Running:
    """Feed layers >= ``first`` with the survivors of ``seam`` and caches of ``capacity``.

    ``ops`` holds the selection's nodes; they are inserted here. ``running`` is what enters, ``tokens`` names the
    dimension of what is returned. Unless ``first`` is 0, the graph gains the inputs ``write_indices.g`` and
    ``key_positions.g`` of the new cache group.
    """
    graph = model.graph
    region = downstream(seam)
    embeds, positions = running.embeds, running.positions
    kept, last_index = survivors.kept_indices, survivors.last_index
    gathered = _gathered(ops, seam, kept, tokens)
    axes = list(positions.shape or ())[:-2]  # M-RoPE: three numbers a token, one tensor each
    everywhere = kept
    if axes:
        everywhere = ops("Expand", everywhere, ops.concat(ops.const(axes), ops("Shape", everywhere)))
    kept_positions = ops("GatherElements", positions, everywhere, axis=1 + len(axes))
    for value, shape in ((kept_positions, (*axes, "B", tokens)), (kept, ("B", tokens)), (last_index, ("B",))):
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(shape)
    group = running.group + (first > 0)
    suffix = "" if group < 2 else f".{group}"
    kept_positions.name, last_index.name = f"kept_position_ids{suffix}", f"kept_last_index{suffix}"
    roots = {seam: gathered, embeds: gathered, positions: kept_positions, running.last_index: last_index}
    if running.rows is not None:
        roots[running.rows] = _rows_left(ops, running.rows, survivors.kept_indices)
    if running.added is not None:
        roots[running.added] = _gathered(ops, running.added, kept, tokens)
    if running.seen is not None:
        roots[running.seen] = _seen_left(ops, running.seen, survivors, tokens, suffix)
    rename: dict[str, str | int] = {running.tokens: tokens}
    if first:
        window = graph_input(model, f"key_positions.{running.group}")
        write_indices = layers[first - 1].write_indices
        roots[write_indices] = ir.val(f"write_indices.{group}", dtype=ir.DataType.INT64, shape=("B",))
        roots[window] = ir.val(f"key_positions.{group}", dtype=ir.DataType.INT64, shape=(f"W{group}",))
        rename[f"W{running.group}"] = f"W{group}"
    side = SideInputs(roots, shape_only=None if seam is embeds else embeds, suffix=f".{max(group, 1)}")
    order = [node for node in graph if node in region]
    side.rewire(order)
    shrink_caches(layers[first:], capacity)

    graph.extend([*ops.nodes, *side.cloned])
    if first:
        start = min(graph.inputs.index(layer.key_cache) for layer in layers[first:])
        graph.inputs[start:start] = [roots[write_indices], roots[window]]
    for node in [*order, *side.cloned]:
        rename_dims(node, rename)
    graph.sort()
    left = (None if value is None else roots[value] for value in (running.rows, running.added, running.seen))
    return Running(gathered, kept_positions, last_index, group, tokens, *left)


def _gathered(ops: Ops, states: ir.Value, kept: ir.Value, tokens: str) -> ir.Value:
    """``states`` [B, S, n] at ``kept`` [B, T]; ``tokens`` names T."""
    found = gather_tokens(ops, states, kept)
    found.type, found.shape = states.type, ir.Shape(("B", tokens, *list(states.shape or ())[2:]))
    return found


def _seen_left(ops: Ops, seen: ir.Value, survivors: Survivors, tokens: str, suffix: str) -> ir.Value:
    """The last survivor that each survivor attends to, [B, T], where ``seen`` [B, S] is the last token.

    TensorRT-RTX 1.7 cannot build a second selection of what is scattered to the survivors' places; gathered it does.
    """
    rank = ops("CumSum", survivors.keep, ops.const(1))
    ends = ops("GatherElements", ops("GatherElements", rank, seen, axis=1), survivors.kept_indices, axis=1)
    left = ops("Sub", ends, ops.const([1]))
    left.name, left.type, left.shape = f"kept_last_seen{suffix}", seen.type, ir.Shape(("B", tokens))
    return left


def _rows_left(ops: Ops, rows: ir.Value, kept_indices: ir.Value) -> ir.Value:
    """Where the tokens at ``rows`` [B, R] are among those that stay, [B, T]; one that does not stay is any of them."""
    before = ops("Less", ops("Unsqueeze", kept_indices, ops.const([1])), ops("Unsqueeze", rows, ops.const([2])))
    count = ops("ReduceSum", ops("Cast", before, to=ir.DataType.INT64), ops.const([2]), keepdims=0)
    place = ops("Min", count, ops("Sub", ops.dim(kept_indices, 1), ops.const([1])))
    place.type, place.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(("B", "R"))
    return place


def name_kept(model: ir.Model, kept_indices: ir.Value) -> None:
    """Make indices [B, T] of the step's tokens that survive the output ``kept_indices``."""
    kept_indices.name, kept_indices.type = "kept_indices", ir.TensorType(ir.DataType.INT64)
    kept_indices.shape = ir.Shape(("B", "Sk"))
    model.graph.outputs.insert(1, kept_indices)


def shrink_caches(layers: list[Layer], capacity: int) -> None:
    """Give the caches of some layers another capacity."""
    for layer in layers:
        for cache in (layer.key_cache, layer.value_cache):
            if cache.shape is None or len(cache.shape) != 4:
                raise GraphError(f"the cache {cache.name} has shape {cache.shape}; expected [B, KV, C, Dh]")
            cache.shape = ir.Shape((*cache.shape[:2], capacity, cache.shape[3]))
            for node, _ in cache.uses():
                if node.op_type == "TensorScatter":
                    node.outputs[0].shape = cache.shape


def rename_dims(node: ir.Node, rename: Mapping[str, str | int]) -> None:
    """Name the dims of a node's outputs anew: a stale name makes ONNX Runtime reuse buffers of the wrong size."""
    for value in node.outputs:
        if value.shape is None:
            continue
        dims = [getattr(dim, "value", dim) for dim in value.shape]
        if any(isinstance(dim, str) and dim not in rename and not dim.isidentifier() for dim in dims):
            value.shape = None  # an expression such as "S + 1"; the runtime infers it anew
        else:
            value.shape = ir.Shape([rename.get(dim, dim) if isinstance(dim, str) else dim for dim in dims])


def drop_unused(model: ir.Model) -> None:
    """Remove nodes that no output needs."""
    RemoveUnusedNodesPass()(model)


def common_capacity(layers: list[Layer]) -> int:
    """Capacity of all caches. Raises GraphError where they differ."""
    capacities = {layer.key_cache.shape[2] for layer in layers if layer.key_cache.shape is not None}
    capacity = capacities.pop() if len(capacities) == 1 else None
    if not isinstance(capacity, int):
        raise GraphError("the caches must share one static capacity before a selection is inserted")
    return capacity
