"""int4: symmetric integers of 4 bits in blocks along K; engines and ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, dequantise, nibbles, scale_shape

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 4
BLOCKS = (128, 64, 32, CHANNEL)
ENGINES_ONLY = False
LIMITS = (-8, 7)  # of its integers
# Clipping at .7 to 1 of the largest magnitude; 7 / 8 uses the code -8 for it.
SHRINK = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int4 [K, N] and scales [K / block, N], or [N] for a block of CHANNEL."""
    return Array("int4", "int4", (inputs, outputs)), Array("int4_scale", dtype, scale_shape(inputs, outputs, block))


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (nibbles uint8 [K * N / 2], scales)."""
    from vlmtrim.graphs.formats.scales import symmetric

    return from_codes(*symmetric(matrix, block, dtype, *LIMITS, SHRINK))


def from_codes(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """int8 [K, N] of -8 to 7, and scales, as they are stored."""
    return nibbles(codes), scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    return dequantise(ops, stored, block)
