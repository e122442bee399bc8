"""int4_zero: integers of 4 bits with zero points in blocks along K, as checkpoints come with; for ONNX Runtime."""

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
    """int4 [K, N], scales [K / block, N] and zero points int4 of the same shape, both [N] for a block of CHANNEL."""
    scales = scale_shape(inputs, outputs, block)
    return (
        Array("int4_zero", "int4", (inputs, outputs)),
        Array("int4_zero_scale", dtype, scales),
        Array("int4_zero_point", "int4", scales),
    )


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    return dequantise(ops, stored, block)
