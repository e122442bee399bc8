"""The operator Attention of opset 23, with past and present, or behind a Concat with the cache.

mobius-onnx writes the first, ``torch.onnx.export`` from opset 23 on the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import rotary
from vlmtrim.graphs.foreign.boundary import Boundary, Cache, rank
from vlmtrim.graphs.foreign.forms import Operands
from vlmtrim.graphs.foreign.forms.written_out import check_joined, joined_values
from vlmtrim.graphs.foreign.nodes import followed, kind, number, operand, result, said, size
from vlmtrim.graphs.foreign.rows import at_row, by_head, mask_row, side_by_side
from vlmtrim.graphs.foreign.trial import HIDDEN, Trial, by_query_head, check_causal, check_fits
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.attention import causal_limit, probabilities, row_index

READS = frozenset({("", "Attention"), ("", "Concat")})
_OPERATOR = ("", "Attention")
_REPEATED = frozenset({"Identity", "Unsqueeze", "Expand", "Reshape"})  # keys of a head for each of its queries
_QUERY, _KEY, _VALUE, _MASK, _PAST_KEY, _PADDING = 0, 1, 2, 3, 4, 6


@dataclass(frozen=True)
class Fused:
    """See :class:`vlmtrim.graphs.foreign.forms.Form`; ``keys`` are all keys [B, KV, T, Dh], ``joined`` the Concat that
    makes them where the operator itself does not."""

    index: int
    node: ir.Node
    keys: ir.Value
    joined: ir.Node | None
    cache: Cache

    positions = False

    @property
    def output(self) -> ir.Value:
        """What the attention returns."""
        return self.node.outputs[0]

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.index}: {said(self.node)}"

    def heads(self) -> tuple[int, int, int]:
        """(H, KV, Dh). Raises GraphError where they are not fixed."""
        query = operand(self.node, _QUERY)
        heads = size(query, 1) if rank(query) == 4 else int(number(self.node, "q_num_heads", 0))
        width = size(query, -1)
        kv_heads = size(self.cache.key, 1) or int(number(self.node, "kv_num_heads", 0))
        if not heads or not kv_heads or heads % kv_heads or not width or (rank(query) == 3 and width % heads):
            raise GraphError(
                f"{self.where}: expected fixed numbers of heads, those of queries a multiple of those of keys; found "
                f"queries {query and query.shape}, {heads or 'unknown'} heads, keys {self.cache.key.shape}"
            )
        return heads, kv_heads, width if rank(query) == 4 else width // heads

    def rows(self, boundary: Boundary) -> FusedRows:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        for name in ("softcap", "qk_matmul_output_mode"):
            if found := number(self.node, name, 0):
                raise GraphError(f"{self.where}: expected {name}=0 where attention scores; found {found:g}")
        if operand(self.node, _PADDING) is not None:
            raise GraphError(f"{self.where}: expected no nonpad_kv_seqlen where attention scores; found one")
        self.heads()
        return FusedRows(self, boundary)

    def operands(self, ops: Ops, positions: ir.Value, steps: tuple[Trial, ...]) -> Operands:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        heads, kv_heads, head_size = self.heads()
        for name in ("softcap", "qk_matmul_output_mode"):
            if found := number(self.node, name, 0):
                raise GraphError(f"{self.where}: expected {name}=0; found {found:g}")
        if operand(self.node, _PADDING) is not None:
            raise GraphError(f"{self.where}: expected no nonpad_kv_seqlen; found one")
        for step in steps:
            check_causal(step, self.where, self._seen(step))
        query, scale = operand(self.node, _QUERY), number(self.node, "scale", head_size**-0.5)
        key, value, joined = operand(self.node, _KEY), operand(self.node, _VALUE), ()
        if self.joined is not None:
            values = joined_values(self.index, self.cache)
            for what, node in ((key, self.joined), (value, values)):
                _, times = by_query_head(steps[0], self.where, what, self.cache, node.outputs[0], turned=False)
                if times != 1:
                    raise GraphError(f"{self.where}: expected keys and values as they are; found them times {times:g}")
            key, value = operand(self.joined, 1), operand(values, 1)
            joined = self.joined.outputs[0], values.outputs[0]
        assert query is not None and key is not None and value is not None
        if rank(query) == rank(key) == 4:
            query, key = (rotary.fused(ops, steps[1], self.where, states, head_size) for states in (query, key))
        query, key = rotary.by_head(ops, query, heads, head_size), rotary.by_head(ops, key, kv_heads, head_size)
        return Operands(query, key, by_head(ops, value, kv_heads, head_size), scale, heads, head_size, joined)

    def _seen(self, step: Trial) -> np.ndarray:
        """Which tokens it sees in a step, bool [.., S, T]. Raises GraphError for a mask that weighs what it shows."""
        mask, seen = operand(self.node, _MASK), np.ones((1, 1, 1, 1), bool)
        if mask is not None:
            found = step.of(self.where, mask)
            seen = found if found.dtype == bool else found > HIDDEN
            if found.dtype != bool and (found[seen] != 0).any():
                raise GraphError(f"{self.where}: expected a mask of zeros where tokens are seen; found other numbers")
        if number(self.node, "is_causal", 0):
            # Behind a Concat the operator does not know the past, and lines up the first query with the first key.
            past = 0 if self.joined is not None else step.past
            causal = np.arange(step.real.shape[1]) <= past + np.arange(step.tokens)[:, None]
            check_fits(self.where, seen, causal)
            seen = seen & causal
        return seen

    def put(self, ops: Ops, attended: ir.Value) -> None:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        heads, _, head_size = self.heads()
        by_token = rank(operand(self.node, _QUERY)) == 3
        self.output.replace_all_uses_with(side_by_side(ops, attended, heads * head_size) if by_token else attended)

    def place(self, ops: Ops, positions: ir.Value) -> None:
        """Nothing to do: positions come from outside."""


@dataclass(frozen=True)
class FusedRows:
    """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""

    layer: Fused
    boundary: Boundary

    def last(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        query = operand(self.layer.node, _QUERY)
        assert query is not None
        past = ops("Expand", ops.dim(self.layer.cache.key, 2), batch)
        limit = self._limit(ops, last_index, past, batch)
        return probabilities(ops, self._row(ops, query, last_index, batch), self.layer.keys, limit), past

    def unrotated(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        _, kv_heads, head_size = self.layer.heads()
        query = rotary.before(self.layer.where, operand(self.layer.node, _QUERY))
        key = rotary.before(self.layer.where, self._new_key())
        limit = causal_limit(ops, row_index(ops, last_index), tokens)
        row = self._row(ops, query, last_index, batch)
        return probabilities(ops, row, by_head(ops, key, kv_heads, head_size), limit)

    def new_keys(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        _, kv_heads, head_size = self.layer.heads()
        return by_head(ops, self._new_key(), kv_heads, head_size)

    def _new_key(self) -> ir.Value:
        node = self.layer.joined
        key = operand(self.layer.node, _KEY) if node is None else node.inputs[1]
        assert key is not None
        return key

    def _row(self, ops: Ops, query: ir.Value, last_index: ir.Value, batch: ir.Value) -> ir.Value:
        """The scaled query at ``last_index`` by key head, [B, KV, G, Dh]."""
        heads, kv_heads, head_size = self.layer.heads()
        row = at_row(ops, query, last_index, batch, heads, head_size)
        row = ops("Reshape", row, ops.const([0, kv_heads, heads // kv_heads, head_size]))
        scale = number(self.layer.node, "scale", head_size**-0.5)
        return row if scale == 1 else ops("Mul", row, ops("CastLike", ops.const(scale, np.float32), row))

    def _limit(self, ops: Ops, last_index: ir.Value, past: ir.Value, batch: ir.Value) -> ir.Value:
        """What is added to the logits of that row, float32, to be broadcast to [B, KV, G, T]."""
        node, limits = self.layer.node, []
        if (mask := operand(node, _MASK)) is not None:
            limits.append(mask_row(ops, self.layer.where, mask, last_index, batch))
        if number(node, "is_causal", 0):
            # Queries of the step line up with the keys behind the past, where the operator knows it.
            until = last_index if self.layer.joined is not None else ops("Add", last_index, past)
            limits.append(causal_limit(ops, row_index(ops, until), ops.dim(self.layer.keys, 2)))
        limits = limits or [ops.const(0.0, np.float32)]
        return limits[0] if len(limits) == 1 else ops("Add", *limits)


def match(index: int, node: ir.Node, cache: Cache) -> Fused | None:
    """The layer whose past keys ``node`` reads, or joins for an Attention to read; None where neither is so."""
    if kind(node) == _OPERATOR:
        keys = result(node, 1)
        if operand(node, _PAST_KEY) is None or keys is None or not keys.name:
            raise GraphError(f"layer {index}: expected {said(node)} with past_key and present_key; found it without")
        return Fused(index, node, keys, None, cache)
    readers = followed(node.outputs[0], _REPEATED)
    found = next((reader for reader, at in readers if kind(reader) == _OPERATOR and at == _KEY), None)
    if found is None:
        return None
    check_joined(index, node, "keys")
    return Fused(index, found, node.outputs[0], node, cache)
