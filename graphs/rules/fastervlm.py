"""Attention of the vision tower's class token, or of all its patches; text is not looked at.

FasterVLM (arXiv 2412.01818). Mean over the heads of the last layer whose states become features, the select layer of
the paper. The vision graph returns it (:mod:`vlmtrim.graphs.passes.vision_scores`), and the runtime hands it on.
"""

from __future__ import annotations

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import VISION, Step

NEEDS = frozenset({VISION})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    return step.ops("Identity", step.guide)
