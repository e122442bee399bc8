"""One token's row of queries and masks in any layout. Shapes as in :mod:`vlmtrim.graphs.surgery.attention`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import rank
from vlmtrim.graphs.foreign.nodes import size
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.attention import row_index


def at_row(ops: Ops, states: ir.Value, last_index: ir.Value, batch: ir.Value, heads: int, head_size: int) -> ir.Value:
    """Of [B, S, width] or [B, H, S, Dh] the token at ``last_index``: [B, 1, width] or [B, H, 1, Dh]."""
    if rank(states) == 4:
        shape = ops.concat(batch, ops.const([heads]), ops.const([1]), ops.const([head_size]))
        return ops("GatherElements", states, ops("Expand", row_index(ops, last_index), shape), axis=2)
    return ops("GatherND", states, ops("Reshape", last_index, ops.const([-1, 1, 1])), batch_dims=1)


def by_head(ops: Ops, states: ir.Value, heads: int, head_size: int) -> ir.Value:
    """[B, S, H * Dh] -> [B, H, S, Dh]; what has four dimensions has them so."""
    if rank(states) == 4:
        return states
    return ops("Transpose", ops("Reshape", states, ops.const([0, 0, heads, head_size])), perm=[0, 2, 1, 3])


def side_by_side(ops: Ops, states: ir.Value, width: int) -> ir.Value:
    """[B, H, S, Dh] -> [B, S, H * Dh], the width."""
    return ops("Reshape", ops("Transpose", states, perm=[0, 2, 1, 3]), ops.const([0, 0, width]))


def mask_row(ops: Ops, where: str, mask: ir.Value, last_index: ir.Value, batch: ir.Value) -> ir.Value:
    """The row at ``last_index`` of a mask, bool or additive, that broadcasts to [B, H, S, T]: float32 [B, 1, 1, T].

    Raises GraphError where heads have masks of their own.
    """
    dtype, missing = mask.dtype, 4 - (rank(mask) or 0)
    if dtype is None or not 0 <= missing <= 2:
        raise GraphError(f"{where}: expected a mask of 2 to 4 dimensions, [B, 1, S, T]; found {dtype} {mask.shape}")
    if missing:
        mask = ops("Unsqueeze", mask, ops.const(list(range(missing))))
    elif size(mask, 1) != 1:
        raise GraphError(f"{where}: expected one mask for all heads, [B, 1, S, T]; found {mask.shape}")
    one = ops.const([1])
    # A single row, or one for all of the batch, becomes one for each.
    rows = ops("Max", ops.dim(mask, 2), ops("Add", ops("ReduceMax", last_index, keepdims=1), one))
    mask = ops("Expand", mask, ops.concat(batch, one, rows, one))
    index = ops("Expand", row_index(ops, last_index), ops.concat(batch, one, one, ops.dim(mask, 3)))
    row = ops("GatherElements", mask, index, axis=2)
    if dtype == ir.DataType.BOOL:
        return ops("Where", row, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))
    return ops("Cast", row, to=ir.DataType.FLOAT)
