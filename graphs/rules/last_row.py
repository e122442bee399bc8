"""Attention that the last token pays to each visual token, mean over query heads.

One row of the layer's own softmax over all keys (FastV, arXiv 2403.06764, as in its code: last query row).
"""

from __future__ import annotations

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import ATTENTION, Step

NEEDS = frozenset({ATTENTION})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops = step.ops
    probabilities, first = step.rows.last(ops, step.last_index, step.sizes.batch)
    # In the cache this step's tokens lie behind what earlier turns wrote.
    cached = ops("Add", step.visual_positions, ops("Unsqueeze", first, ops.const([1])))
    return ops("GatherElements", probabilities, cached, axis=1)
