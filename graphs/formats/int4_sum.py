"""int4_sum: int4_zero for engines: sums of inputs take the zero points' share out of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmtrim.graphs.formats import CHANNEL, Array, dequantise, scale_shape

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 4
BLOCKS = (128, 64, 32, CHANNEL)
ENGINES_ONLY = False


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int4 [K, N], scales [K / block, N] and scales times zero points of the same shape, both [N] for CHANNEL."""
    scales = scale_shape(inputs, outputs, block)
    return (
        Array("int4_sum", "int4", (inputs, outputs)),
        Array("int4_sum_scale", dtype, scales),
        Array("int4_sum_offset", dtype, scales),
    )


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype, zero points left out."""
    return dequantise(ops, stored[:2], block)


def multiply(ops: Ops, x: ir.Value, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The product of x [..., K] by the matrix: that by the restored one, less what the zero points add to it, the sum
    of every block's inputs times the block's offsets."""
    product = ops("MatMul", x, restore(ops, stored, block))
    product.type = x.type
    if block == CHANNEL:
        sums = ops("ReduceSum", x, ops.const([-1]), keepdims=1)
        return ops("Sub", product, ops("Mul", sums, stored[2]))
    assert stored[2].shape is not None
    rows = ops("Shape", x, start=0, end=-1)
    parts = ops("Reshape", x, ops.concat(rows, ops.const([stored[2].shape[0], block])))
    sums = ops("ReduceSum", parts, ops.const([-1]), keepdims=0)
    return ops("Sub", product, ops("MatMul", sums, stored[2]))
