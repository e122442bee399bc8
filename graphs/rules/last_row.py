"""Attention that the last token pays to each visual token, mean over query heads.

One row of the layer's own softmax over all keys (FastV, arXiv 2403.06764, as in its code: last query row).
"""

from __future__ import annotations

from vlmtrim.graphs.later import anatomy, attention, ir
from vlmtrim.graphs.rules import ATTENTION, Step

NEEDS = frozenset({ATTENTION})


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops, layer = step.ops, step.layer
    query, factor = anatomy.before_scaling(layer.query)
    index = attention.row_index(ops, step.last_index)
    row = attention.query_row(ops, layer, query, factor, index, step.sizes.batch)
    window = ops.dim(layer.key, 2)
    limit_shape = ops.concat(step.sizes.batch, ops.const([1]), ops.const([1]), window)
    limit = ops("GatherElements", layer.mask, ops("Expand", index, limit_shape), axis=2)
    probabilities = attention.probabilities(ops, row, layer.key, limit)
    # In the cache this step's tokens lie behind what earlier turns wrote.
    cached = ops("Add", step.visual_positions, ops("Unsqueeze", layer.write_indices, ops.const([1])))
    return ops("GatherElements", probabilities, cached, axis=1)
