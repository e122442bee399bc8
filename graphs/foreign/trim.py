"""FastV in a decoder that others exported: the same boundary, one input more, ``visual_positions``, and one output.

Rules:
1. the layers before the seam stay as they are, the selection is that of :class:`vlmtrim.graphs.methods.fastv.FastV`;
2. later layers read the survivors; all that they read from outside is derived again (:mod:`..surgery.region`) for the
   survivors' positions, the later caches' length and a mask of their own (:mod:`.masks`);
3. positions stay the original ones: those of ``position_ids``, or counted from the mask where attention counts itself;
4. a step without visual tokens removes nothing and is what it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import masks
from vlmtrim.graphs.foreign.boundary import Boundary, rank
from vlmtrim.graphs.foreign.forms import SIZES, Form, opened
from vlmtrim.graphs.foreign.nodes import said, size
from vlmtrim.graphs.foreign.opset import opset_of, spelled
from vlmtrim.graphs.foreign.seam import check_sides, seam_before
from vlmtrim.graphs.foreign.whole import check_produced, check_subgraphs, infer_missing
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step
from vlmtrim.graphs.surgery import select
from vlmtrim.graphs.surgery.region import SideInputs, downstream

MOST_VISUAL = 16384  # visual tokens of a step, where nobody says
_SUFFIX = ".survivors"
_COMPARISONS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
# Names of dimensions behind the selection: survivors of this step, entries of the caches before it, and both.
_KEPT, _PAST, _ALL = "kept_tokens", "kept_past", "kept_past + kept_tokens"


@dataclass(frozen=True)
class Selection:
    """What is asked of a decoder; see :class:`vlmtrim.graphs.methods.fastv.FastV`."""

    k: int
    r: float
    seed: int
    rank: Callable[[Step], ir.Value]
    grid: tuple[int, int] | None
    most_visual: int


def trim(model: ir.Model, wanted: Selection) -> ir.Model:
    """Insert the selection in place, and return the model.

    Raises:
        GraphError: the decoder is not of a form that is known; the message names the layer, what was expected there
            and what was found.
    """
    opset = opset_of(model)
    check_produced(model)
    boundary, layers = opened(model)
    with _shapes(model):
        _trim(model, boundary, layers, wanted, opset)
    NameFixPass()(model)
    return model


def _trim(model: ir.Model, boundary: Boundary, layers: list[Form], wanted: Selection, opset: int) -> None:
    if wanted.k >= len(layers):
        raise GraphError(f"k is {wanted.k}, the decoder has {len(layers)} layers: give 0 to {len(layers) - 1}")
    check_subgraphs(model, boundary)
    _check_positions(boundary, layers[wanted.k :])
    share_sizes(boundary)
    seam = seam_before(model, boundary, layers, wanted.k)
    region = set().union(*(downstream(value) for value in seam))
    check_sides(boundary, layers, region, wanted.k)
    ops = Ops("select")
    later = _select(model, boundary, layers, seam, ops, wanted)
    _split(model, boundary, layers, seam, region, ops, later, wanted.k, opset)


@contextmanager
def _shapes(model: ir.Model) -> Iterator[None]:
    """Inferred shapes where none were, for as long as the block runs: some that onnx infers of operators of other
    domains contradict what ONNX Runtime does."""
    missing = infer_missing(model)
    yield
    for value in missing:
        if not value.is_graph_output():
            value.shape = None


def _check_positions(boundary: Boundary, later: list[Form]) -> None:
    if boundary.positions is None and not all(layer.positions for layer in later):
        raise GraphError(
            "expected the input position_ids, so that survivors can keep their positions; found none: export with it"
        )
    if (node := compared(boundary)) is not None:
        raise GraphError(
            f"expected masks from attention_mask and lengths; found {said(node)}, which compares position_ids: those "
            "of survivors have gaps, and tokens would see what comes after them"
        )
    if boundary.mask is None and any(layer.positions for layer in later):
        raise GraphError("expected the input attention_mask where attention counts positions itself; found none")


def compared(boundary: Boundary) -> ir.Node | None:
    """A node that compares positions, outside of what is computed from the tokens themselves; None without one."""
    if boundary.positions is None:
        return None

    def sizes(_: ir.Value, node: ir.Node, __: int) -> bool:
        return node.op_type in SIZES

    states = downstream(boundary.tokens, sizes)
    by_position = downstream(boundary.positions, sizes) - states
    return next((node for node in by_position if node.op_type in _COMPARISONS), None)


def share_sizes(boundary: Boundary) -> None:
    """Read every cache's size off the first one: before a selection all are alike, behind it there are two lengths."""
    first = boundary.caches[0].key
    for cache in boundary.caches:
        for value in (cache.key, cache.value):
            alike = all(size(value, axis) == size(first, axis) for axis in (1, 3))
            for node, index in value.uses():
                if alike and node.op_type in SIZES:
                    node.replace_input_with(index, first)


@dataclass(frozen=True)
class Later:
    """What the layers behind a selection are made of, besides their weights."""

    survivors: select.Survivors
    mask: ir.Value | None
    past_tokens: ir.Value | None
    positions: ir.Value | None
    tokens: ir.Value
    seam: dict[ir.Value, ir.Value]


def _select(
    model: ir.Model, boundary: Boundary, layers: list[Form], seam: list[ir.Value], ops: Ops, wanted: Selection
) -> Later:
    """Rank, keep, compact and gather; the nodes are collected in ``ops``."""
    assert boundary.tokens.shape is not None
    shape = ir.Shape((boundary.tokens.shape[0], ir.SymbolicDim("visual_tokens")))
    visual = ir.Value(name="visual_positions", type=ir.TensorType(ir.DataType.INT64), shape=shape)
    model.graph.inputs.append(visual)
    sizes = select.counts(ops, boundary.tokens, visual, wanted.r, wanted.most_visual)
    masked = None if boundary.mask is None else masks.read(ops, boundary.mask, sizes)
    last_index = masks.last_index(ops, masked, sizes)
    embeds = _embeddings(ops, boundary)
    step = Step(
        ops=ops,
        model=None,
        layers=[],
        embeds=embeds,
        seam=seam[-1] if wanted.k else embeds,
        last_index=last_index,
        visual_positions=visual,
        position_ids=boundary.positions,
        sizes=sizes,
        seed=wanted.seed,
        grid=wanted.grid,
        probe=layers[wanted.k - 1].rows(boundary) if wanted.k else None,
    )
    keep = select.keep_best(ops, wanted.rank(step), visual, sizes, wanted.r)
    survivors = select.compact(ops, keep, last_index, sizes)
    kept = survivors.kept_indices
    gathered = {value: _gathered(ops, value, kept) for value in seam}
    past = ops.dim(boundary.caches[wanted.k].key, 2)
    return Later(
        survivors,
        None if masked is None else masks.of_survivors(ops, masked, keep, past, sizes),
        None if masked is None else masks.past_tokens(ops, masked),
        None if boundary.positions is None else _positions(ops, boundary.positions, kept),
        gathered[seam[-1]] if boundary.embedded else _gathered(ops, boundary.tokens, kept),
        gathered,
    )


def _lookup(boundary: Boundary) -> ir.Node | None:
    """What turns ids into embeddings [B, S, D]; None where tokens are embeddings.

    Raises GraphError where nothing does.
    """
    if boundary.embedded:
        return None
    for node, index in boundary.tokens.uses():
        if node.op_type.startswith("Gather") and index == 1:
            return node
    raise GraphError("expected input_ids to be looked up by a Gather; found none")


def _embeddings(ops: Ops, boundary: Boundary) -> ir.Value:
    """Embeddings [B, S, D] of all tokens, which the decoder's own are not where the selection comes first."""
    lookup = _lookup(boundary)
    if lookup is None:
        return boundary.tokens
    again = ir.node(
        lookup.op_type,
        list(lookup.inputs),
        attributes=lookup.attributes,
        domain=lookup.domain,
        name=f"{ops.prefix}/embeddings",
    )
    again.outputs[0].name = f"{ops.prefix}/embeddings"
    ops.nodes.append(again)
    return again.outputs[0]


def _gathered(ops: Ops, value: ir.Value, kept: ir.Value) -> ir.Value:
    """Of a value [B, S] or [B, S, D] the survivors."""
    by_token = rank(value) == 2
    found = ops("GatherElements", value, kept, axis=1) if by_token else select.gather_tokens(ops, value, kept)
    found.type = value.type
    return found


def _positions(ops: Ops, positions: ir.Value, kept: ir.Value) -> ir.Value:
    """Of positions [B, S] or [n, B, S] those of the survivors; rows may share theirs, [1, S]."""
    if rank(positions) == 3:
        axes = ops.dim(positions, 0)
        kept = ops("Expand", kept, ops.concat(axes, ops("Shape", kept)))
        leading = ops.concat(axes, ops.dim(kept, 1))
    else:
        leading = ops.dim(kept, 0)
    whole = ops("Expand", positions, ops.concat(leading, ops.const([1])))
    found = ops("GatherElements", whole, kept, axis=(rank(positions) or 2) - 1)
    found.type = positions.type
    return found


def _split(
    model: ir.Model,
    boundary: Boundary,
    layers: list[Form],
    seam: list[ir.Value],
    region: set[ir.Node],
    ops: Ops,
    later: Later,
    first: int,
    opset: int,
) -> None:
    """Make the region read what ``later`` says instead of what it read so far."""
    graph = model.graph
    roots = {boundary.tokens: later.tokens, **later.seam}
    for old, new in ((boundary.mask, later.mask), (boundary.positions, later.positions)):
        if old is not None and new is not None:
            roots[old] = new
    for cache in boundary.caches[:first]:
        roots |= {cache.key: boundary.caches[first].key, cache.value: boundary.caches[first].value}
    lookup = _lookup(boundary)
    states = boundary.tokens if lookup is None else lookup.outputs[0]
    shape_only = states if first else None
    side = SideInputs(roots, shape_only=shape_only, suffix=_SUFFIX)
    order = [node for node in graph if node in region]
    side.rewire(order)
    counted = None
    if any(layer.positions for layer in layers[first:]):
        counted = ops("Add", later.survivors.kept_indices, later.past_tokens)
    graph.extend([*ops.nodes, *side.cloned])
    for layer in layers[first:]:
        if counted is not None:
            layer.place(ops, counted)
    graph.outputs.append(later.survivors.kept_indices)
    _rename(boundary, [*order, *side.cloned], first, later.survivors.kept_indices)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    for node in [node for node in graph if (node.name or "").startswith(f"{ops.prefix}/")]:
        spelled(node, opset)
    RemoveUnusedNodesPass()(model)


def _rename(boundary: Boundary, nodes: list[ir.Node], first: int, kept: ir.Value) -> None:
    """Sizes behind the seam have names of their own: a stale one makes ONNX Runtime reuse buffers of the wrong size."""
    assert boundary.tokens.shape is not None and boundary.logits.shape is not None
    batch, tokens = boundary.tokens.shape[:2]
    ends = {boundary.logits, *(value for cache in boundary.caches for value in (cache.new_key, cache.new_value))}
    for node in nodes:
        for value in node.outputs:
            if value not in ends:
                value.shape = None
    if len(boundary.logits.shape) > 1 and boundary.logits.shape[1] == tokens:
        boundary.logits.shape = _with(boundary.logits.shape, 1, _KEPT)
    for cache in boundary.caches[first:]:
        for value, name in ((cache.key, _PAST), (cache.value, _PAST), (cache.new_key, _ALL), (cache.new_value, _ALL)):
            if value.shape is not None and len(value.shape) == 4:
                value.shape = _with(value.shape, 2, name)
    kept.name, kept.type = "kept_indices", ir.TensorType(ir.DataType.INT64)
    kept.shape = ir.Shape((batch, _KEPT))


def _with(shape: ir.Shape, axis: int, dim: str) -> ir.Shape:
    """The shape with another dimension at an axis."""
    dims = list(shape)
    dims[axis] = ir.SymbolicDim(dim)
    return ir.Shape(dims)
