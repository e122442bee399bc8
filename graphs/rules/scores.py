"""How visual tokens are ranked: one rule a function, from what a step offers to a score of every visual token.

Shapes: B rows, S tokens of this step, N visual tokens, W live window of the scoring layer's caches, H query heads, KV
key/value heads, G = H / KV, Dh head size. A rule returns float32 [B, N]; of equal scores the lowest index counts as
the higher. A new rule is a function in this file and its line in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import Layer, before_scaling, unrotated
from vlmtrim.graphs.surgery.select import Counts

ABOVE_ANY_PROBABILITY = 2.0


@dataclass(frozen=True)
class Step:
    """What a rule may read.

    Attributes:
        layer: the last layer that runs on all tokens; None where the selection comes before the first.
        last_index: int64 [B], each row's last real token.
        visual_positions: int64 [B, N].
        seed: of the rules that draw or shift.
    """

    ops: Ops
    layer: Layer | None
    last_index: ir.Value
    visual_positions: ir.Value
    sizes: Counts
    seed: int


def last_row(step: Step) -> ir.Value:
    """Attention that the last token pays to each visual token, mean over query heads.

    One row of the layer's own softmax over all keys (FastV, arXiv 2403.06764, as in its code: last query row). The
    matrix product is K q^T so that only the single query row is ever transposed.
    """
    ops, layer = step.ops, _layer(step)
    query, factor = before_scaling(layer.query)
    row = _last_query(step, layer, query, factor)
    window = ops.dim(layer.key, 2)
    limit_shape = ops.concat(step.sizes.batch, ops.const([1]), ops.const([1]), window)
    limit = ops("GatherElements", layer.mask, ops("Expand", _row_index(step), limit_shape), axis=2)
    probabilities = _probabilities(ops, row, layer.key, limit)
    # In the cache this step's tokens lie behind what earlier turns wrote.
    cached = ops("Add", step.visual_positions, ops("Unsqueeze", layer.write_indices, ops.const([1])))
    return ops("GatherElements", probabilities, cached, axis=1)


def no_rope(step: Step) -> ir.Value:
    """The same row from queries and keys before their rotary embedding, over the tokens of this step.

    The rotation decays with distance, so that the plain row favours the end of the picture whatever is there
    (Feather the Throttle, arXiv 2412.13180). Earlier turns are left out: the caches hold rotated keys only.
    """
    ops, layer = step.ops, _layer(step)
    query, key = unrotated(layer)
    _, factor = before_scaling(layer.query)
    row = _last_query(step, layer, query, factor)
    token = ops("Range", ops.const(0), ops("Squeeze", step.sizes.tokens, ops.const([0])), ops.const(1))
    seen = ops("LessOrEqual", token, _row_index(step))  # [B, 1, 1, S]
    limit = ops("Where", seen, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))
    return ops("GatherElements", _probabilities(ops, row, key, limit), step.visual_positions, axis=1)


def coverage(step: Step) -> ir.Value:
    """Half of the survivors at a uniform stride, the others by :func:`last_row`.

    The stride sees to it that every part of the picture stays represented (the ensemble of arXiv 2412.13180).
    """
    ops = step.ops
    half = ops("Div", step.sizes.kept_visual, ops.const([2]))
    return ops("Add", last_row(step), _at_stride(step, half, ABOVE_ANY_PROBABILITY))


def stride(step: Step) -> ir.Value:
    """1 for M tokens at a uniform stride, number floor((i N + seed mod N) / M), 0 for the others."""
    return _at_stride(step, step.sizes.kept_visual, 1.0)


def random(step: Step) -> ir.Value:
    """Number i of ``numpy.random.default_rng(seed).random(dtype=float32)`` for visual token i: the same every step."""
    ops = step.ops
    table = np.random.default_rng(step.seed).random(step.sizes.most_visual, dtype=np.float32)
    drawn = ops.slice(ops.const(table, np.float32), ops.const([0]), step.sizes.visual, axis=0)
    return ops("Expand", drawn, ops("Shape", step.visual_positions))


RULES: dict[str, Callable[[Step], ir.Value]] = {
    "last-row": last_row,
    "no-rope": no_rope,
    "coverage": coverage,
    "stride": stride,
    "random": random,
}
NEED_ATTENTION = ("last-row", "no-rope", "coverage")
NEED_SEED = ("stride", "random")


def _layer(step: Step) -> Layer:
    if step.layer is None:
        raise GraphError("there is no layer before the selection whose attention could score: give k = 1 or more")
    return step.layer


def _row_index(step: Step) -> ir.Value:
    return step.ops("Reshape", step.last_index, step.ops.const([-1, 1, 1, 1]))


def _last_query(step: Step, layer: Layer, query: ir.Value, factor: ir.Value | None) -> ir.Value:
    """The last token's query, scaled and grouped by key head: [B, KV, G, Dh]."""
    ops = step.ops
    heads, kv_heads, size = _head_counts(layer)
    shape = ops.concat(step.sizes.batch, ops.const([heads]), ops.const([1]), ops.const([size]))
    row = ops("GatherElements", query, ops("Expand", _row_index(step), shape), axis=2)
    if factor is not None:
        row = ops("Mul", row, factor)
    if layer.scale != 1.0:
        row = ops("Mul", row, ops("CastLike", ops.const(layer.scale, np.float32), row))
    return ops("Reshape", row, ops.const([0, kv_heads, heads // kv_heads, size]))


def _probabilities(ops: Ops, row: ir.Value, key: ir.Value, limit: ir.Value) -> ir.Value:
    """Softmax over the keys [B, KV, W, Dh] in float32 under the limit [B, 1, 1, W], mean over heads: [B, W]."""
    logits = ops("MatMul", key, ops("Transpose", row, perm=[0, 1, 3, 2]))  # [B, KV, W, G]
    logits = ops("Cast", ops("Transpose", logits, perm=[0, 1, 3, 2]), to=ir.DataType.FLOAT)
    limited = ops("Add", logits, ops("Cast", limit, to=ir.DataType.FLOAT))
    return ops("ReduceMean", ops("Softmax", limited, axis=-1), ops.const([1, 2]), keepdims=0)


def _at_stride(step: Step, count: ir.Value, score: float) -> ir.Value:
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


def _head_counts(layer: Layer) -> tuple[int, int, int]:
    query, cache = layer.query.shape, layer.key_cache.shape
    if query is None or cache is None or not (isinstance(query[1], int) and isinstance(cache[1], int)):
        raise GraphError(f"the head counts of layer {layer.index} are not static: query {query}, cache {cache}")
    heads, kv_heads = query[1], cache[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % kv_heads:
        raise GraphError(f"layer {layer.index} has {heads} query heads, no multiple of its {kv_heads} key heads")
    return heads, kv_heads, int(cache[3])  # type: ignore[arg-type]
