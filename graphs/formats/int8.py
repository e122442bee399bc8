"""int8: symmetric integers of 8 bits in blocks along K; engines and ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 8
BLOCKS = (128, 64, 32, CHANNEL)
ENGINES_ONLY = False


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """int8 [K, N] and scales [K / block, N], or [N] for a block of CHANNEL."""
    scales = (outputs,) if block == CHANNEL else (inputs // block, outputs)
    return Array("int8", "int8", (inputs, outputs)), Array("int8_scale", dtype, scales)


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (int8 [K, N], scales). At 127 steps clipping serves nothing, so nothing is searched."""
    from vlmtrim.graphs.formats.scales import symmetric

    return symmetric(matrix, block, dtype, -127, 127, (1.0,))


def from_codes(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, ...]:
    """int8 [K, N] and scales, as they are stored."""
    return codes, scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    layout = {"axis": 1} if block == CHANNEL else {"axis": 0, "block_size": block}
    return ops("DequantizeLinear", *stored, **layout)
