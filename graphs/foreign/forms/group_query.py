"""com.microsoft.GroupQueryAttention, with and without rotary embedding inside.

onnxruntime-genai writes it, and mobius-onnx for some execution providers.

Inside, the operator counts positions from the length of its cache; of a ``position_ids`` input its first step reads one
number only. Behind a selection positions have gaps, so there the rotary embedding is taken out, before the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import rotary
from vlmtrim.graphs.foreign.boundary import Boundary, Cache, rank
from vlmtrim.graphs.foreign.forms import Operands
from vlmtrim.graphs.foreign.nodes import MICROSOFT, number, operand, result, said, size
from vlmtrim.graphs.foreign.rows import at_row, by_head, mask_row, side_by_side
from vlmtrim.graphs.foreign.trial import Trial
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.attention import causal_limit, probabilities, row_index

READS = frozenset({(MICROSOFT, "GroupQueryAttention")})
_QUERY, _KEY, _VALUE, _PAST_KEY, _SEQLENS, _COS, _SIN, _POSITIONS, _BIAS = 0, 1, 2, 3, 5, 7, 8, 9, 10
_SINK, _K_SCALE, _V_SCALE, _Q_NORM, _K_NORM = 11, 12, 13, 14, 15
_ROTARY = ("do_rotary", "rotary_interleaved")


@dataclass(frozen=True)
class GroupQuery:
    """See :class:`vlmtrim.graphs.foreign.forms.Form`."""

    index: int
    node: ir.Node
    cache: Cache

    @property
    def output(self) -> ir.Value:
        """What the attention returns, [B, S, H * Dh]."""
        return self.node.outputs[0]

    @property
    def positions(self) -> bool:
        """Whether the rotary embedding is inside."""
        return bool(number(self.node, "do_rotary", 0))

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.index}: {said(self.node)}"

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values come as one value."""
        return operand(self.node, _KEY) is None

    def heads(self) -> tuple[int, int, int]:
        """(H, KV, Dh). Raises GraphError where they are not known."""
        heads, kv_heads = (int(number(self.node, name, 0)) for name in ("num_heads", "kv_num_heads"))
        width, columns = size(operand(self.node, _QUERY), -1), heads + 2 * kv_heads if self.packed else heads
        head_size = size(self.cache.key, 3) or (
            width // columns if width and columns and width % columns == 0 else None
        )
        if heads < 1 or kv_heads < 1 or heads % kv_heads or not head_size:
            raise GraphError(
                f"{self.where}: expected fixed numbers of heads, those of queries a multiple of those of keys, and a "
                f"fixed head size; found {heads}, {kv_heads} and queries of width {width or 'unknown'}"
            )
        return heads, kv_heads, head_size

    def refuse(self, inputs: dict[str, int], attributes: tuple[str, ...], when: str) -> None:
        """Raise GraphError where the node has one of those inputs or attributes."""
        for name, at in inputs.items():
            if (value := operand(self.node, at)) is not None:
                raise GraphError(f"{self.where}: expected no {name} {when}; found {value.name}")
        for name in attributes:
            if found := number(self.node, name, 0):
                raise GraphError(f"{self.where}: expected {name}=0 {when}; found {found:g}")

    def tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines by position, [most, rotated / 2]."""
        tables = operand(self.node, _COS), operand(self.node, _SIN)
        if tables[0] is None or tables[1] is None:
            raise GraphError(f"{self.where}: expected cos_cache and sin_cache with do_rotary=1; found none")
        return tables[0], tables[1]

    def settings(self) -> dict[str, int]:
        """Attributes of the rotary embedding that does what the operator does inside."""
        half, (_, _, head_size) = size(self.tables()[0], 1), self.heads()
        if half is None or 2 * half > head_size:
            raise GraphError(f"{self.where}: expected cos_cache of a fixed width, at most Dh / 2; found {half}")
        return {
            "interleaved": int(number(self.node, "rotary_interleaved", 0)),
            "rotary_embedding_dim": 0 if 2 * half == head_size else 2 * half,
        }

    def parts(self, ops: Ops) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Queries, keys and values, [B, S, heads * Dh] each."""
        query, key, value = (operand(self.node, at) for at in (_QUERY, _KEY, _VALUE))
        assert query is not None
        if key is not None and value is not None:
            return query, key, value
        heads, kv_heads, head_size = self.heads()
        sizes = ops.const([heads * head_size, kv_heads * head_size, kv_heads * head_size])
        return ops("Split", query, sizes, outputs=3, axis=2)

    def rows(self, boundary: Boundary) -> GroupQueryRows:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        unknown = {"head_sink": _SINK, "k_scale": _K_SCALE, "v_scale": _V_SCALE, "q_norm_weight": _Q_NORM}
        self.refuse(unknown, ("smooth_softmax", "kv_cache_bit_width"), "where attention scores")
        self.heads()
        if operand(self.node, _SEQLENS) is None:
            raise GraphError(f"{self.where}: expected seqlens_k; found none")
        if self.positions:
            self.settings()
        return GroupQueryRows(self, boundary)

    def operands(self, ops: Ops, positions: ir.Value, steps: tuple[Trial, ...]) -> Operands:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        unknown = {"attention_bias": _BIAS, "head_sink": _SINK, "k_scale": _K_SCALE, "q_norm_weight": _Q_NORM}
        self.refuse(unknown, ("softcap", "smooth_softmax", "kv_cache_bit_width"), "here")
        window, wanted = max(0, int(number(self.node, "local_window_size", -1))), steps[0].window
        if window != wanted or not number(self.node, "causal", 1):
            to = f"{wanted} tokens, as in the checkpoint" if wanted else "all tokens"
            raise GraphError(f"{self.where}: expected causal attention to {to}; found another window, or none")
        for step in steps:
            found = step.of(self.where, operand(self.node, _SEQLENS)).reshape(-1)
            if found.tolist() != (step.real.sum(1) - 1).tolist():
                raise GraphError(f"{self.where}: expected seqlens_k, the real tokens less one; found {found.tolist()}")
        heads, kv_heads, head_size = self.heads()
        query, key, value = self.parts(ops)
        value = by_head(ops, value, kv_heads, head_size)
        scale = number(self.node, "scale", 0) or head_size**-0.5
        if not self.positions:
            query, key = rotary.by_head(ops, query, heads, head_size), rotary.by_head(ops, key, kv_heads, head_size)
            return Operands(query, key, value, scale, heads, head_size)
        cos, sin = (ops("Gather", table, positions) for table in self.tables())
        settings = self.settings()
        query, key = (
            ops("RotaryEmbedding", by_head(ops, part, count, head_size), cos, sin, **settings)
            for part, count in ((query, heads), (key, kv_heads))
        )
        return Operands(query, key, value, scale, heads, head_size)

    def put(self, ops: Ops, attended: ir.Value) -> None:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        heads, _, head_size = self.heads()
        self.output.replace_all_uses_with(side_by_side(ops, attended, heads * head_size))

    def place(self, ops: Ops, positions: ir.Value) -> None:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`: the rotary embedding is taken out."""
        if not self.positions:
            return
        self.refuse({"q_norm_weight": _Q_NORM, "k_norm_weight": _K_NORM}, (), "with do_rotary=1 behind a selection")
        heads, kv_heads, _ = self.heads()
        if (given := operand(self.node, _POSITIONS)) is not None:
            positions = given
        tables, settings, own = self.tables(), self.settings(), Ops(f"{ops.prefix}/rotary{self.index}")
        query, key, value = self.parts(own)
        query = rotary.rotated(own, query, positions, tables, heads, **settings)
        key = rotary.rotated(own, key, positions, tables, kv_heads, **settings)
        inputs = [query, key, value, *self.node.inputs[3:]]
        for at in (_COS, _SIN, _POSITIONS):
            if at < len(inputs):
                inputs[at] = None
        for name in _ROTARY:
            self.node.attributes.pop(name, None)
        while inputs[-1] is None:
            inputs.pop()
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, own.nodes)
        self.node.resize_inputs(len(inputs))
        for at, new in enumerate(inputs):
            self.node.replace_input_with(at, new)


@dataclass(frozen=True)
class GroupQueryRows:
    """See :class:`vlmtrim.graphs.surgery.attention.Rows`. Rows are padded on the right: of a row's cache the operator
    reads what ``seqlens_k`` says."""

    layer: GroupQuery
    boundary: Boundary

    def last(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        node, (heads, kv_heads, head_size) = self.layer.node, self.layer.heads()
        position, keys = self._last_key(ops), self.layer.cache.new_key
        row = self._query(ops, last_index, batch)
        if self.layer.positions:
            at = ops("Unsqueeze", self._position(ops, position, last_index, batch), ops.const([1]))
            row = rotary.rotated(ops, row, at, self.layer.tables(), heads, **self.layer.settings())
        row = ops("Reshape", row, ops.const([0, kv_heads, heads // kv_heads, head_size]))
        scale = number(node, "scale", 0) or head_size**-0.5
        row = ops("Mul", row, ops("CastLike", ops.const(scale, np.float32), row))
        cap = number(node, "softcap", 0)
        limit = self._limit(ops, position, last_index, batch)
        return probabilities(ops, row, keys, limit, cap=cap), ops("Sub", position, last_index)

    def _last_key(self, ops: Ops) -> ir.Value:
        """Number of each row's last key, which is that of its last token: int64 [B]."""
        return ops("Reshape", ops("Cast", self.layer.node.inputs[_SEQLENS], to=ir.DataType.INT64), ops.const([-1]))

    def _query(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> ir.Value:
        """The query at ``last_index``, [B, 1, H * Dh]."""
        heads, _, head_size = self.layer.heads()
        query = operand(self.layer.node, _QUERY)
        assert query is not None
        row = at_row(ops, query, last_index, batch, heads, head_size)
        if not self.layer.packed:
            return row
        return ops.slice(row, ops.const([0]), ops.const([heads * head_size]), axis=2)

    def _position(self, ops: Ops, position: ir.Value, last_index: ir.Value, batch: ir.Value) -> ir.Value:
        """Position of the last token, int64 [B]."""
        given = operand(self.layer.node, _POSITIONS)
        if given is None:
            return position
        if rank(given) != 2:
            raise GraphError(f"{self.layer.where}: expected position_ids [B, S]; found {given.shape}")
        given = ops("Expand", given, ops.concat(batch, ops.const([1])))
        return ops("GatherND", given, ops("Unsqueeze", last_index, ops.const([1])), batch_dims=1)

    def _limit(self, ops: Ops, position: ir.Value, last_index: ir.Value, batch: ir.Value) -> ir.Value:
        """What is added to the logits of that row, float32 [B, 1, 1, T]."""
        node = self.layer.node
        limit = causal_limit(ops, row_index(ops, position), ops.dim(self.layer.cache.new_key, 2))
        if (window := int(number(node, "local_window_size", -1))) > 0:
            first = ops("Sub", position, ops.const(window))
            before = causal_limit(ops, row_index(ops, first), ops.dim(self.layer.cache.new_key, 2))
            gone = ops("Equal", before, ops.const(0.0, np.float32))
            limit = ops("Where", gone, ops.const(-np.inf, np.float32), limit)
        if (bias := operand(node, _BIAS)) is not None:
            limit = ops("Add", limit, mask_row(ops, self.layer.where, bias, last_index, batch))
        return limit

    def unrotated(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        heads, kv_heads, head_size = self.layer.heads()
        query, key, _ = self.layer.parts(ops)
        if not self.layer.positions:
            query, key = (rotary.before(self.layer.where, value) for value in (query, key))
        row = at_row(ops, query, last_index, batch, heads, head_size)
        row = ops("Reshape", row, ops.const([0, kv_heads, heads // kv_heads, head_size]))
        scale = number(self.layer.node, "scale", 0) or head_size**-0.5
        row = ops("Mul", row, ops("CastLike", ops.const(scale, np.float32), row))
        limit = causal_limit(ops, row_index(ops, last_index), tokens)
        return probabilities(ops, row, by_head(ops, key, kv_heads, head_size), limit)

    def new_keys(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`: read off the returned cache, where they are rotated."""
        _, kv_heads, _ = self.layer.heads()
        first = ops("Unsqueeze", ops("Sub", self._last_key(ops), last_index), ops.const([1]))
        number = ops("Range", ops.const(0), ops("Squeeze", tokens, ops.const([0])), ops.const(1))
        places = ops("Unsqueeze", ops("Add", first, number), ops.const([1, 3]))
        places = ops("Expand", places, ops.concat(batch, ops.const([kv_heads]), tokens, ops.const([1])))
        return ops("GatherND", self.layer.cache.new_key, places, batch_dims=2)


def match(index: int, node: ir.Node, cache: Cache) -> GroupQuery:
    """The layer whose past keys ``node`` reads."""
    if operand(node, _PAST_KEY) is None or result(node, 1) is not cache.new_key:
        raise GraphError(f"layer {index}: expected {said(node)} to return {cache.new_key.name}; found something else")
    if number(node, "sliding_window_cache", 0):
        raise GraphError(
            f"layer {index}: expected {cache.key.name} to grow with the tokens; found sliding_window_cache=1 of "
            f"{said(node)}, a cache as long as its window: build with windowed_kv_cache=false"
        )
    return GroupQuery(index, node, cache)
