"""Half of the survivors at a uniform stride, the others by the attention of the last token.

The stride sees to it that every part of the picture stays represented (the ensemble of arXiv 2412.13180).
"""

from __future__ import annotations

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import ATTENTION, Step, last_row, stride

NEEDS = frozenset({ATTENTION})
_ABOVE_ANY_PROBABILITY = 2.0


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops = step.ops
    half = ops("Div", step.sizes.kept_visual, ops.const([2]))
    return ops("Add", last_row.score(step), stride.at_stride(step, half, _ABOVE_ANY_PROBABILITY))
