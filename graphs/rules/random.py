"""Number i of ``numpy.random.default_rng(seed).random(dtype=float32)`` for visual token i, every step: a baseline."""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import SEED, Step

NEEDS = frozenset({SEED})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops = step.ops
    table = np.random.default_rng(step.seed).random(step.sizes.most_visual, dtype=np.float32)
    drawn = ops.slice(ops.const(table, np.float32), ops.const([0]), step.sizes.visual, axis=0)
    return ops("Expand", drawn, ops("Shape", step.visual_positions))
