"""int4: symmetric integers of 4 bits in blocks along K; engines and ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, nibbles

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 4
BLOCKS = (128, 64, 32, CHANNEL)
ENGINES_ONLY = False
# Clipping at .7 to 1 of the largest magnitude; 7 / 8 uses the code -8 for it.
SHRINK = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7)


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int4 [K, N] and scales [K / block, N], or [N] for a block of CHANNEL."""
    scales = (outputs,) if block == CHANNEL else (inputs // block, outputs)
    return Array("int4", "int4", (inputs, outputs)), Array("int4_scale", dtype, scales)


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (nibbles uint8 [K * N / 2], scales)."""
    from vlmtrim.graphs.formats.scales import symmetric

    return from_codes(*symmetric(matrix, block, dtype, -8, 7, SHRINK))


def from_codes(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """int8 [K, N] of -8 to 7, and scales, as they are stored."""
    return nibbles(codes), scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    layout = {"axis": 1} if block == CHANNEL else {"axis": 0, "block_size": block}
    return ops("DequantizeLinear", *stored, **layout)
