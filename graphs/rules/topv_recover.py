"""topv with the paper's recovery: of the tokens that it drops, every fourth comes back, within the same number.

TopV (arXiv 2503.18278) recovers every fourth dropped token for LLaVA, evenly over the picture. So that as many tokens
stay as with any other score, fewer are taken by rank: (4 M - N) / 3 of the M; none from r = 0.75 on.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.contract import kept_count
from vlmtrim.graphs.later import ir, select
from vlmtrim.graphs.rules import Step, topv

NEEDS = topv.NEEDS
EVERY = 4


def score(step: Step) -> ir.Value:
    """float32 [B, N]: 2 for what rank takes, 1 for what comes back, and half of topv's score, a share of 1."""
    ops = step.ops
    importance = topv.score(step)
    table = [by_rank(n, kept_count(n, step.sizes.removed)) for n in range(step.sizes.most_visual + 1)]
    count = ops("Gather", ops.const(table), step.sizes.visual)
    best = select.top(ops, importance, count, max(table), largest=True)
    ones = ops("Expand", ops.const([1]), ops("Shape", best))
    zeros = ops("Expand", ops.const([0]), ops("Shape", step.visual_positions))
    ranked = ops("ScatterElements", zeros, best, ones, axis=1)
    dropped = ops("Sub", ops.const([1]), ranked)
    number = ops("Sub", ops("CumSum", dropped, ops.const(1)), dropped)
    back = ops("Mul", dropped, ops("Cast", ops("Equal", ops("Mod", number, ops.const([EVERY])), ops.const([0])), to=7))
    whole = ops("Add", ops("Mul", ranked, ops.const([2])), back)
    half = ops("Mul", importance, ops.const(0.5, np.float32))
    return ops("Add", ops("Cast", whole, to=ir.DataType.FLOAT), half)


def by_rank(visual: int, kept: int) -> int:
    """How many rank takes, so that with every fourth of the others at most ``kept`` stay."""
    return next((m for m in range(kept, 0, -1) if m - (m - visual) // EVERY <= kept), 0)
