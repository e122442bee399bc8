"""int8: symmetric integers of 8 bits in blocks along K; engines and ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, dequantise, scale_shape

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 8
BLOCKS = (128, 64, 32, CHANNEL)
ENGINES_ONLY = False
LIMITS = (-127, 127)  # of its integers
SHRINK = (1.0,)  # at 127 steps clipping serves nothing, so nothing is searched


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int8 [K, N] and scales [K / block, N], or [N] for a block of CHANNEL."""
    return Array("int8", "int8", (inputs, outputs)), Array("int8_scale", dtype, scale_shape(inputs, outputs, block))


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
