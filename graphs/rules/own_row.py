"""Attention that the last token would pay in layer k itself, with its norm and weights, over the tokens of this step.

PyramidDrop (arXiv 2410.17247) ranks so, before the layer has run. It costs the layer's keys of all tokens; earlier
turns are left out: what their caches hold is not what layer k would hold of this step. Works at k = 0.
"""

from __future__ import annotations

import dataclasses

from vlmtrim.graphs.later import attention, ir, parts, region, select
from vlmtrim.graphs.rules import Step

NEEDS: frozenset[str] = frozenset()


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    step.own_model("own-row")
    ops, layer = step.ops, step.behind
    assert layer is not None
    key, row = _key_and_query(step)
    heads, kv_heads, size = attention.head_counts(layer)
    row = ops("Reshape", attention.scaled(ops, layer, row), ops.const([0, kv_heads, heads // kv_heads, size]))
    limit = attention.causal_limit(ops, attention.row_index(ops, step.last_index), step.sizes.tokens)
    return ops("GatherElements", attention.probabilities(ops, row, key, limit), step.visual_positions, axis=1)


def _key_and_query(step: Step) -> tuple[ir.Value, ir.Value]:
    """Keys [B, KV, S, Dh] of this step and the last token's query [B, H, 1, Dh], computed beside the layer's own."""
    ops, model, layer = step.ops, step.model, step.behind
    assert layer is not None and model is not None
    new_key = layer.key_update.inputs[1]
    assert new_key is not None
    of = parts.parts_of(model, [*step.layers, layer], layer, step.position_ids)
    copy = ops("Identity", step.seam)
    copy.type, copy.shape = step.seam.type, step.seam.shape
    side = region.SideInputs({step.seam: copy}, shape_only=None, suffix=f".own{layer.index}")
    key, normed = side.derive(new_key), side.derive(of.normed)
    last = ops("Unsqueeze", step.last_index, ops.const([1]))  # [B, 1]
    of = dataclasses.replace(of, normed=normed)
    gather = lambda table, rows: select.gather_tokens(ops, table, rows)  # noqa: E731
    row, cloned = parts.queries_at(model, ops, layer, of, last, step.sizes.batch, gather, step.embeds)
    ops.nodes.extend([*side.cloned, *cloned])
    return key, row
