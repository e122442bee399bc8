"""Rows of a layer's attention, computed beside the layer: what scores are made of.

Shapes: B rows, R query rows, W keys, H query heads, KV key/value heads, G = H / KV, Dh head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import Layer, before_scaling, unrotated


class Rows(Protocol):
    """What rules read of a layer's attention, whatever its form in the graph. S are the tokens of this step."""

    def last(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(probabilities of each row's token at ``last_index``, mean over heads, float32 [B, W]; where this step's
        tokens begin among the keys, int64 [B])."""
        ...

    def unrotated(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """The same from queries and keys before their rotary embedding, over this step's tokens alone: [B, S]."""
        ...

    def new_keys(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """Keys of this step's tokens, [B, KV, S, Dh]."""
        ...


@dataclass(frozen=True)
class LayerRows:
    """Rows of a layer of our own form."""

    layer: Layer

    def last(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See :class:`Rows`."""
        layer = self.layer
        query, factor = before_scaling(layer.query)
        index = row_index(ops, last_index)
        row = query_row(ops, layer, query, factor, index, batch)
        limit_shape = ops.concat(batch, ops.const([1]), ops.const([1]), ops.dim(layer.key, 2))
        limit = ops("GatherElements", layer.mask, ops("Expand", index, limit_shape), axis=2)
        return probabilities(ops, row, layer.key, limit), layer.write_indices

    def unrotated(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`Rows`."""
        query, key = unrotated(self.layer)
        _, factor = before_scaling(self.layer.query)
        index = row_index(ops, last_index)
        row = query_row(ops, self.layer, query, factor, index, batch)
        return probabilities(ops, row, key, causal_limit(ops, index, tokens))

    def new_keys(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`Rows`."""
        keys = self.layer.key_update.inputs[1]
        assert keys is not None
        return keys


def causal_limit(ops: Ops, index: ir.Value, tokens: ir.Value) -> ir.Value:
    """0 for tokens of this step up to ``index`` (of :func:`row_index`), else minus infinity: float32 [B, 1, 1, S]."""
    token = ops("Range", ops.const(0), ops("Squeeze", tokens, ops.const([0])), ops.const(1))
    seen = ops("LessOrEqual", token, index)
    return ops("Where", seen, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))


def row_index(ops: Ops, last_index: ir.Value) -> ir.Value:
    """int64 [B] -> [B, 1, 1, 1]."""
    return ops("Reshape", last_index, ops.const([-1, 1, 1, 1]))


def query_row(
    ops: Ops, layer: Layer, query: ir.Value, factor: ir.Value | None, index: ir.Value, batch: ir.Value
) -> ir.Value:
    """The query at ``index`` (of :func:`row_index`), scaled and grouped by key head: [B, KV, G, Dh]."""
    heads, kv_heads, size = head_counts(layer)
    row = scaled(ops, layer, _at(ops, layer, query, index, batch), factor)
    return ops("Reshape", row, ops.const([0, kv_heads, heads // kv_heads, size]))


def query_rows(ops: Ops, layer: Layer, rows: ir.Value, batch: ir.Value) -> ir.Value:
    """The queries at ``rows`` int64 [B, R], scaled: [B, H, R, Dh]. No second reader of the product that attention reads
    (:func:`anatomy.before_scaling`)."""
    query, factor = before_scaling(layer.query)
    index = ops("Unsqueeze", rows, ops.const([1, 3]))
    return scaled(ops, layer, _at(ops, layer, query, index, batch, ops.dim(rows, 1)), factor)


def rows_probabilities(ops: Ops, layer: Layer, queries: ir.Value, limit: ir.Value, batch: ir.Value) -> ir.Value:
    """Softmax of scaled queries [B, H, R, Dh] over the layer's keys, in float32 under the limit [B, 1, R, W]:
    [B, H, R, W]. R may be 0."""
    heads, kv_heads, size = head_counts(layer)
    count = ops.dim(queries, 2)
    columns = ops("Mul", count, ops.const([heads // kv_heads]))
    grouped = ops.concat(batch, ops.const([kv_heads]), columns, ops.const([size]))
    grouped = ops("Reshape", queries, grouped, allowzero=1)
    logits = ops("MatMul", layer.key, ops("Transpose", grouped, perm=[0, 1, 3, 2]))  # [B, KV, W, G * R]
    by_head = ops.concat(batch, ops.const([heads]), count, ops.dim(layer.key, 2))
    logits = ops("Reshape", ops("Transpose", logits, perm=[0, 1, 3, 2]), by_head, allowzero=1)
    limited = ops("Add", ops("Cast", logits, to=ir.DataType.FLOAT), ops("Cast", limit, to=ir.DataType.FLOAT))
    return ops("Softmax", limited, axis=-1)


def _at(
    ops: Ops, layer: Layer, query: ir.Value, index: ir.Value, batch: ir.Value, count: ir.Value | None = None
) -> ir.Value:
    """Of ``query`` [B, H, S, Dh] the tokens at ``index`` [B, 1, R, 1]; ``count`` is R, [1], None for 1."""
    heads, _, size = head_counts(layer)
    shape = ops.concat(batch, ops.const([heads]), count or ops.const([1]), ops.const([size]))
    return ops("GatherElements", query, ops("Expand", index, shape), axis=2)


def scaled(ops: Ops, layer: Layer, queries: ir.Value, factor: ir.Value | None = None) -> ir.Value:
    """Queries times ``factor`` and the attention's own scale."""
    if factor is not None:
        queries = ops("Mul", queries, factor)
    if layer.scale != 1.0:
        queries = ops("Mul", queries, ops("CastLike", ops.const(layer.scale, np.float32), queries))
    return queries


def probabilities(
    ops: Ops, row: ir.Value, key: ir.Value, limit: ir.Value, over: tuple[int, ...] = (1, 2), cap: float = 0.0
) -> ir.Value:
    """Softmax over the keys [B, KV, W, Dh] in float32 under the limit [B, 1, 1, W], mean over heads: [B, W].

    ``over``: (2,) for the mean over the query heads of a key head alone, [B, KV, W]. ``cap``: logits are bent to stay
    below it before the limit, ``cap * tanh(logits / cap)``; 0 for none.

    The product is K q^T so that only the single query row is ever transposed.
    """
    logits = ops("MatMul", key, ops("Transpose", row, perm=[0, 1, 3, 2]))  # [B, KV, W, G]
    logits = ops("Cast", ops("Transpose", logits, perm=[0, 1, 3, 2]), to=ir.DataType.FLOAT)
    if cap:
        logits = ops("Mul", ops("Tanh", ops("Div", logits, ops.const(cap, np.float32))), ops.const(cap, np.float32))
    limited = ops("Add", logits, ops("Cast", limit, to=ir.DataType.FLOAT))
    return mean_of_softmax(ops, limited, over)


def mean_of_softmax(ops: Ops, logits: ir.Value, over: tuple[int, ...] = (1, 2)) -> ir.Value:
    """Softmax over the last axis of float32 [B, .., .., W], mean over both axes of heads, or ``over`` some: [B, W]."""
    return ops("ReduceMean", ops("Softmax", logits, axis=-1), ops.const(over), keepdims=0)


def head_counts(layer: Layer) -> tuple[int, int, int]:
    """(H, KV, Dh). Raises GraphError where they are not static."""
    query, cache = layer.query.shape, layer.key_cache.shape
    if query is None or cache is None or not (isinstance(query[1], int) and isinstance(cache[1], int)):
        raise GraphError(f"the head counts of layer {layer.index} are not static: query {query}, cache {cache}")
    heads, kv_heads = query[1], cache[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % kv_heads:
        raise GraphError(f"layer {layer.index} has {heads} query heads, no multiple of its {kv_heads} key heads")
    return heads, kv_heads, int(cache[3])  # type: ignore[arg-type]
