"""w8a8: integers of 8 bits times activations rounded to 8 bits, a scale a column and a token; ONNX Runtime's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, scale_shape
from vlmtrim.graphs.formats.int8 import LIMITS, SHRINK, from_codes, pack
from vlmtrim.graphs.later import ir

if TYPE_CHECKING:
    from vlmtrim.graphs.ops import Ops

__all__ = ("LIMITS", "SHRINK", "from_codes", "pack")  # stored as int8 is

BITS = 8
BLOCKS = (CHANNEL,)
ENGINES_ONLY = False
ZERO = 128  # what stands for 0 among the activations: kernels multiply unsigned integers by signed ones
TINY = 1e-30  # the least magnitude of a token, so that none is divided by 0


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int8 [K, N] and scales [N]."""
    return Array("w8a8", "int8", (inputs, outputs)), Array("w8a8_scale", dtype, scale_shape(inputs, outputs, block))


def multiply(ops: Ops, x: ir.Value, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The product of x [..., K] and the matrix: each row of x is rounded to 255 steps of its largest magnitude, as
    ZeroQuant's activations are token by token (arXiv:2206.01861), and sums of integers, which float16 could not hold,
    are scaled in float32."""
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
