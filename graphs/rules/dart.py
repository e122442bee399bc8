"""Few pivots, then the tokens least like each of them: DART (arXiv 2502.11494), by the states at the seam.

Pivots are the 8 visual tokens whose keys in the layer before the selection have the largest L1 norm (at k = 0, whose
embeddings have); one after the other they take the tokens of lowest cosine that are left, as many each. The pivots of
the paper may be text, too.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.contract import kept_count
from vlmtrim.graphs.later import ir, select, states
from vlmtrim.graphs.rules import Step

NEEDS: frozenset[str] = frozenset()
PIVOTS = 8


def score(step: Step) -> ir.Value:
    """float32 [B, N]: pivots by their norms, then every pivot's tokens, the least like it first."""
    ops, first = step.ops, step.ops.const([1])
    features = states.unit(ops, select.gather_tokens(ops, step.seam, step.visual_positions))
    count = ops("Min", step.sizes.visual, ops.const([PIVOTS]))
    pivots = select.top(ops, _norms(step), count, PIVOTS, largest=True)  # [B, P]
    order = ops("Range", ops.const(0), ops("Squeeze", count, ops.const([0])), ops.const(1))
    order = ops("Sub", ops.const(3.0 * PIVOTS, np.float32), ops("Cast", order, to=ir.DataType.FLOAT))
    order = ops("Expand", order, ops("Shape", pivots))
    scores = ops("Expand", ops.const(0.0, np.float32), ops("Shape", step.visual_positions))
    scores = ops("ScatterElements", scores, pivots, order, axis=1)
    of_pivots = select.gather_tokens(ops, features, pivots)
    cosines = states.cosines(ops, of_pivots, features)  # [B, P, N]
    each = ops("Gather", ops.const(_shares(step)), step.sizes.visual)
    for pivot in range(PIVOTS):
        # No row where there are fewer pivots: then all visual tokens are pivots.
        row = ops.slice(cosines, ops.const([pivot]), ops.const([pivot + 1]), axis=1)
        likeness = ops("ReduceSum", row, first, keepdims=0)
        taken = ops("Cast", ops("Greater", scores, ops.const(0.0, np.float32)), to=ir.DataType.FLOAT)
        left = ops("Sub", ops("Mul", taken, ops.const(-4.0, np.float32)), likeness)
        chosen = select.top(ops, left, each, max(_shares(step)), largest=True)
        half = ops("Mul", likeness, ops.const(0.5, np.float32))
        unlike = ops("Sub", ops.const(2.0 * (PIVOTS - pivot) + 0.5, np.float32), half)
        update = ops("GatherElements", ops("Max", scores, unlike), chosen, axis=1)
        scores = ops("ScatterElements", scores, chosen, update, axis=1)
    return scores


def _norms(step: Step) -> ir.Value:
    """L1 norms of the visual tokens' keys, or of their embeddings, float32 [B, N]."""
    ops = step.ops
    if not step.layers and step.probe is None:
        values = ops("Cast", select.gather_tokens(ops, step.embeds, step.visual_positions), to=ir.DataType.FLOAT)
        return ops("ReduceSum", ops("Abs", values), ops.const([2]), keepdims=0)
    keys = step.rows.new_keys(ops, step.last_index, step.sizes.batch, step.sizes.tokens)
    norms = ops("ReduceSum", ops("Abs", ops("Cast", keys, to=ir.DataType.FLOAT)), ops.const([1, 3]), keepdims=0)
    return ops("GatherElements", norms, step.visual_positions, axis=1)


def _shares(step: Step) -> list[int]:
    """How many tokens a pivot takes, by the number of visual tokens."""
    most, removed = step.sizes.most_visual, step.sizes.removed
    return [-(-max(kept_count(n, removed) - PIVOTS, 0) // PIVOTS) for n in range(most + 1)]
