"""The last token's attention from queries and keys before their rotary embedding, over the tokens of this step.

The rotation decays with distance, so that the plain row favours the end of the picture whatever is there
(Feather the Throttle, arXiv 2412.13180). Earlier turns are left out: the caches hold rotated keys only.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import anatomy, attention, ir
from vlmtrim.graphs.rules import ATTENTION, Step

NEEDS = frozenset({ATTENTION})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops, layer = step.ops, step.layer
    query, key = anatomy.unrotated(layer)
    _, factor = anatomy.before_scaling(layer.query)
    index = attention.row_index(ops, step.last_index)
    row = attention.query_row(ops, layer, query, factor, index, step.sizes.batch)
    token = ops("Range", ops.const(0), ops("Squeeze", step.sizes.tokens, ops.const([0])), ops.const(1))
    seen = ops("LessOrEqual", token, index)  # [B, 1, 1, S]
    limit = ops("Where", seen, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))
    return ops("GatherElements", attention.probabilities(ops, row, key, limit), step.visual_positions, axis=1)
