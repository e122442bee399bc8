"""Masks of later layers, whose caches lack what was removed. Shapes: B rows, S tokens, T = P + S with those before.

A mask [B, T] comes from whoever drives the decoder, who counts all tokens. What earlier steps removed is not known by
its place; it is R real tokens of each row, and all are alike. So the mask of later layers leaves out the first R ones
of what came before this step: exact with padding on the left, and on the right of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.select import Counts, kept_first


@dataclass(frozen=True)
class Masked:
    """A mask [B, T], 1 for real tokens as int64 [B, T], and T - S, the tokens before this step, [1]."""

    mask: ir.Value
    real: ir.Value
    before: ir.Value


def read(ops: Ops, mask: ir.Value, sizes: Counts) -> Masked:
    """What a mask of any type says."""
    real = ops("Cast", ops("Cast", mask, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    return Masked(mask, real, ops("Sub", ops.dim(mask, 1), sizes.tokens))


def last_index(ops: Ops, masked: Masked | None, sizes: Counts) -> ir.Value:
    """Index in S of each row's last real token, int64 [B]."""
    if masked is None:
        return ops("Expand", ops("Sub", sizes.tokens, ops.const([1])), sizes.batch)
    new = ops.slice(masked.real, masked.before, ops.dim(masked.mask, 1), axis=1)
    number = ops("Range", ops.const(0), ops("Squeeze", sizes.tokens, ops.const([0])), ops.const(1))
    return ops("ReduceMax", ops("Mul", new, number), ops.const([1]), keepdims=0)


def past_tokens(ops: Ops, masked: Masked) -> ir.Value:
    """Real tokens of each row before this step, int64 [B, 1]."""
    old = ops.slice(masked.real, ops.const([0]), masked.before, axis=1)
    return ops("ReduceSum", old, ops.const([1]), keepdims=1)


def of_survivors(ops: Ops, masked: Masked, keep: ir.Value, past: ir.Value, sizes: Counts) -> ir.Value:
    """The mask [B, past + kept] of layers whose caches hold ``past`` [1] entries, for the tokens in ``keep`` [B, S]."""
    old = ops.slice(masked.real, ops.const([0]), masked.before, axis=1)
    gone = ops("Sub", masked.before, past)
    first = ops("LessOrEqual", ops("CumSum", old, ops.const(1)), gone)
    removed = ops("Mul", ops("Cast", first, to=ir.DataType.INT64), old)
    kept = ops("Concat", ops("Sub", ops.const([1]), removed), keep, axis=1)
    count = ops("Add", past, sizes.survivors)
    columns = ops.slice(kept_first(ops, kept, ops.dim(masked.mask, 1), count), ops.const([0]), count, axis=1)
    return ops("GatherElements", masked.mask, columns, axis=1)
