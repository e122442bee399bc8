"""The last token's attention from queries and keys before their rotary embedding, over the tokens of this step.

The rotation decays with distance, so that the plain row favours the end of the picture whatever is there
(Feather the Throttle, arXiv 2412.13180). Earlier turns are left out: the caches hold rotated keys only.
"""

from __future__ import annotations

from vlmtrim.graphs.later import ir
from vlmtrim.graphs.rules import ATTENTION, Step

NEEDS = frozenset({ATTENTION})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    probabilities = step.rows.unrotated(step.ops, step.last_index, step.sizes.batch, step.sizes.tokens)
    return step.ops("GatherElements", probabilities, step.visual_positions, axis=1)
