"""w8a8: integers of 8 bits times activations rounded to 8 bits, a scale a column and a token; ONNX Runtime's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, dequantise, scale_shape
from vlmtrim.graphs.later import ir

if TYPE_CHECKING:
    from vlmtrim.graphs.ops import Ops

BITS = 8
BLOCKS = (CHANNEL,)
ENGINES_ONLY = False
LIMITS = (-127, 127)  # of its integers
SHRINK = (1.0,)
ZERO = 128  # what stands for 0 among the activations: kernels multiply unsigned integers by signed ones
TINY = 1e-30  # the least magnitude of a token, so that none is divided by 0


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int8 [K, N] and scales [N]."""
    return Array("w8a8", "int8", (inputs, outputs)), Array("w8a8_scale", dtype, scale_shape(inputs, outputs, block))


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (int8 [K, N], scales)."""
    from vlmtrim.graphs.formats.scales import symmetric

    return symmetric(matrix, block, dtype, *LIMITS, SHRINK)


def from_codes(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """int8 [K, N] and scales, as they are stored."""
    return codes, scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    return dequantise(ops, stored, block)


def multiply(ops: Ops, x: ir.Value, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The product of x [..., K] and the matrix: each row of x is rounded to 255 steps of its largest magnitude, and
    sums of integers, which float16 could not hold, are scaled in float32."""
    matrix, scales = stored
    dtype = scales.dtype
    if dtype != ir.DataType.FLOAT:
        x, scales = (ops("Cast", value, to=ir.DataType.FLOAT) for value in (x, scales))
    largest = ops("ReduceMax", ops("Abs", x), ops.const([-1]), keepdims=1)
    step = ops("Mul", ops("Max", largest, ops.const(TINY, np.float32)), ops.const(1 / LIMITS[1], np.float32))
    zero = ops.const(ZERO, np.uint8)
    codes = ops("QuantizeLinear", ops("Div", x, step), ops.const(1, np.float32), zero)
    sums = ops("Cast", ops("MatMulInteger", codes, matrix, zero), to=ir.DataType.FLOAT)
    product = ops("Mul", ops("Mul", sums, step), scales)
    return product if dtype == ir.DataType.FLOAT else ops("Cast", product, to=dtype)
