"""Visual tokens at a uniform stride, number floor((i N + seed mod N) / M) for i < M: a baseline."""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import SEED, Step

NEEDS = frozenset({SEED})


def score(step: Step) -> ir.Value:
    """1 for the M chosen, 0 for the others: float32 [B, N]."""
    return at_stride(step, step.sizes.kept_visual, 1.0)


def at_stride(step: Step, count: ir.Value, score: float) -> ir.Value:
    """``score`` for ``count`` tokens at a uniform stride, 0 for the others: float32 [B, N]."""
    ops = step.ops
    one = ops.const([1])
    phase = ops("Mod", ops.const([step.seed]), ops("Max", step.sizes.visual, one))
    index = ops("Range", ops.const(0), ops("Squeeze", count, ops.const([0])), ops.const(1))
    strided = ops("Div", ops("Add", ops("Mul", index, step.sizes.visual), phase), ops("Max", count, one))
    chosen = ops("Expand", strided, ops.concat(step.sizes.batch, count))
    zeros = ops("Expand", ops.const(0.0, np.float32), ops("Shape", step.visual_positions))
    updates = ops("Expand", ops.const(score, np.float32), ops("Shape", chosen))
    return ops("ScatterElements", zeros, chosen, updates, axis=1)
