"""The selection subgraph: scores (:mod:`vlmtrim.graphs.rules`) -> keep -> compact -> gather, in standard operators.

Shapes: B rows, S tokens of this step, N visual tokens, M kept visual tokens, T = S - N + M tokens that survive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.contract import kept_count
from vlmtrim.graphs.ops import Ops

# Largest K of TensorRT's TopK (its operator reference). A larger constant fails the build, a computed one does not.
TOPK_LIMIT = 3840


@dataclass(frozen=True)
class Counts:
    """Sizes of this step as [1] int64 values, the largest N that any step may have, and the share that is removed."""

    batch: ir.Value
    tokens: ir.Value
    visual: ir.Value
    kept_visual: ir.Value
    survivors: ir.Value
    most_visual: int
    removed: float


def counts(ops: Ops, hidden: ir.Value, visual_positions: ir.Value, removed: float, most_visual: int) -> Counts:
    """Sizes from shapes alone. M is looked up in a table of :func:`kept_count`, so that it is exact for every N.

    Float arithmetic in the graph would round N * (1 - r) differently from Python's float64 at decimal halves.
    """
    batch, tokens = ops.dim(hidden, 0), ops.dim(hidden, 1)
    visual = ops.dim(visual_positions, 1)
    table = ops.const([kept_count(n, removed) for n in range(most_visual + 1)])
    kept = ops("Gather", table, visual)
    survivors = ops("Add", ops("Sub", tokens, visual), kept)
    return Counts(batch, tokens, visual, kept, survivors, most_visual, removed)


def keep_best(
    ops: Ops, scores: ir.Value, visual_positions: ir.Value, sizes: Counts, removed: float, by_winners: bool = False
) -> ir.Value:
    """Keep vector int64 [B, S]: 1 for text and for the M visual tokens of highest score; lowest index wins ties.

    TopK runs on the smaller side, so K stays below N / 2, unless it is to name the winners anyway. When it names the
    losers, the scores are reversed first: among equals TopK takes the lowest index, and of equals the highest index
    must go.
    """
    most_kept = kept_count(sizes.most_visual, removed)
    ones = ops("Expand", ops.const([1]), ops.concat(sizes.batch, sizes.tokens))
    if removed < 0.5 and not by_winners:
        # TensorRT bounds sizes by interval arithmetic; what may be negative by its bounds does not build.
        dropped_count = ops("Max", ops("Sub", sizes.visual, sizes.kept_visual), ops.const([0]))
        last = ops("Sub", sizes.visual, ops.const([1]))
        number = ops("Range", ops.const(0), ops("Squeeze", sizes.visual, ops.const([0])), ops.const(1))
        reversed_scores = ops("Gather", scores, ops("Sub", last, number), axis=1)
        from_end = top(ops, reversed_scores, dropped_count, sizes.most_visual - most_kept, largest=False)
        dropped = ops("Sub", last, from_end)
        return ops("ScatterElements", ones, *_mark(ops, visual_positions, dropped, 0), axis=1)
    kept = top(ops, scores, sizes.kept_visual, most_kept, largest=True)
    zeros = ops("Expand", ops.const([0]), ops("Shape", visual_positions))
    text_only = ops("ScatterElements", ones, visual_positions, zeros, axis=1)
    return ops("ScatterElements", text_only, *_mark(ops, visual_positions, kept, 1), axis=1)


def top(ops: Ops, scores: ir.Value, count: ir.Value, most: int, largest: bool, axis: int = 1) -> ir.Value:
    """Indices int64 [.., K] of the K largest or smallest finite scores [.., N], best first, lowest index first in ties.

    Where K (``count``, at most ``most``) may exceed TensorRT's limit, TopK runs in rounds: each takes what is left to
    take, up to the limit, and hides it from the next. A round with nothing left to take has K = 0. ``axis`` is N's.
    """
    rounds = []
    for taken in range(0, max(most, 1), TOPK_LIMIT):
        left = count
        if most > TOPK_LIMIT:
            left = ops("Max", ops("Sub", count, ops.const([taken])), ops.const([0])) if taken else count
            left = ops("Min", left, ops.const([TOPK_LIMIT]))
        if rounds:
            worst = ops.const(-np.inf if largest else np.inf, np.float32)
            hidden = ops("Expand", worst, ops("Shape", rounds[-1]))
            scores = ops("ScatterElements", scores, rounds[-1], hidden, axis=axis)
        _, indices = ops("TopK", scores, left, outputs=2, axis=axis, largest=int(largest), sorted=1)
        rounds.append(indices)
    return rounds[0] if len(rounds) == 1 else ops("Concat", *rounds, axis=axis)


def _mark(ops: Ops, visual_positions: ir.Value, chosen: ir.Value, mark: int) -> tuple[ir.Value, ir.Value]:
    """(indices, updates) that write ``mark`` at the chosen visual tokens (indices into N)."""
    positions = ops("GatherElements", visual_positions, chosen, axis=1)
    return positions, ops("Expand", ops.const([mark]), ops("Shape", positions))


@dataclass(frozen=True)
class Survivors:
    """kept_indices int64 [B, T] into S, ascending, each row's last real token among them, int64 [B], and what they come
    from: 1 for survivors, 0 for others, int64 [B, S]."""

    kept_indices: ir.Value
    last_index: ir.Value
    keep: ir.Value


def compact(ops: Ops, keep: ir.Value, last_index: ir.Value, sizes: Counts) -> Survivors:
    """Indices of the ones in ``keep``, and where the last real token went."""
    kept_indices = ops.slice(kept_first(ops, keep, sizes.tokens, sizes.survivors), ops.const([0]), sizes.survivors, 1)
    # No visual token comes after the last real one, so every removed token lies before it. Reading its rank out of
    # slot_kept would say the same, but TensorRT-RTX 1.7 cannot build a gather at an index that was itself gathered.
    return Survivors(kept_indices, ops("Sub", last_index, ops("Sub", sizes.tokens, sizes.survivors)), keep)


def kept_first(
    ops: Ops, keep: ir.Value, size: ir.Value, count: ir.Value, clip: bool = False, axis: int = 1
) -> ir.Value:
    """Numbers 0 .. n-1 of each row with the ones in ``keep`` [B, n] first, ascending, without a sort.

    Each one's slot is its rank, the others go behind. ``size`` is n, [1]; ``count`` how many ones there are, [1] where
    every row has as many, else [B, 1]. ``clip``: with fewer ones than that, as when engines are asked for their shapes
    with positions that repeat, some of the others share a slot. ``axis`` is n's, the last.
    """
    rank = ops("CumSum", keep, ops.const(axis))
    number = ops("Range", ops.const(0), ops("Squeeze", size, ops.const([0])), ops.const(1))
    slot_kept = ops("Sub", rank, ops.const([1]))
    slot_removed = ops("Sub", ops("Add", count, number), rank)
    slot = ops("Where", ops("Cast", keep, to=ir.DataType.BOOL), slot_kept, slot_removed)
    if clip:
        slot = ops("Min", slot, ops("Sub", size, ops.const([1])))
    numbers = ops("Expand", number, ops("Shape", keep))
    return ops("ScatterElements", numbers, slot, numbers, axis=axis)


def gather_tokens(ops: Ops, hidden: ir.Value, kept_indices: ir.Value) -> ir.Value:
    """Rows of ``hidden`` [B, S, D] at ``kept_indices`` [B, T] -> [B, T, D]."""
    return ops("GatherND", hidden, ops("Unsqueeze", kept_indices, ops.const([2])), batch_dims=1)
