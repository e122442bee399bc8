"""fp8: floats of 8 bits (e4m3), one scale a column; engines only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 8
BLOCKS = (CHANNEL,)
ENGINES_ONLY = True  # ONNX Runtime would turn them into floats at every step
LARGEST = 448.0  # of e4m3


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """float8e4m3fn [K, N] and scales [N]."""
    return Array("fp8", "float8e4m3fn", (inputs, outputs)), Array("fp8_scale", dtype, (outputs,))


def pack(matrix: np.ndarray, block: int, dtype: str, importance: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (float8 [K, N], scales): a float's error is relative, so nothing is searched."""
    import ml_dtypes

    from vlmtrim.graphs.formats.scales import DTYPES

    smallest = np.float32(ml_dtypes.finfo(DTYPES[dtype]).smallest_normal)
    scales = np.maximum(np.abs(matrix).max(axis=0) / np.float32(LARGEST), smallest).astype(DTYPES[dtype])
    wide = scales.astype(np.float32)
    codes = np.empty(matrix.shape, ml_dtypes.float8_e4m3fn)
    for start in range(0, len(matrix), 256):
        part = slice(start, start + 256)
        codes[part] = np.clip(matrix[part] / wide, -LARGEST, LARGEST).astype(
            codes.dtype
        )  # rounded scales may exceed it
    return codes, scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    return ops("DequantizeLinear", *stored, axis=1)
