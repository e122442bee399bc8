"""fp8: floats of 8 bits (e4m3), one scale a column or a block along K; engines only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import CHANNEL, Array, dequantise, scale_shape

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 8
BLOCKS = (CHANNEL, 128)
ENGINES_ONLY = True  # ONNX Runtime would turn them into floats at every step
LARGEST = 448.0  # of e4m3


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """float8e4m3fn [K, N] and scales [K / block, N], or [N] for a block of CHANNEL."""
    scales = scale_shape(inputs, outputs, block)
    return Array("fp8", "float8e4m3fn", (inputs, outputs)), Array("fp8_scale", dtype, scales)


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (float8 [K, N], scales): a float's error is relative, so nothing is searched."""
    import ml_dtypes

    from vlmtrim.graphs.formats.scales import DTYPES

    blocks = matrix.reshape(-1, len(matrix) if block == CHANNEL else block, matrix.shape[1])
    smallest = np.float32(ml_dtypes.finfo(DTYPES[dtype]).smallest_normal)
    scales = np.maximum(np.abs(blocks).max(axis=1) / np.float32(LARGEST), smallest).astype(DTYPES[dtype])
    wide = scales.astype(np.float32)
    codes = np.empty(blocks.shape, ml_dtypes.float8_e4m3fn)
    for index, values in enumerate(blocks):
        for start in range(0, len(values), 256):
            part = slice(start, start + 256)
            near = np.clip(values[part] / wide[index], -LARGEST, LARGEST)  # rounded scales may exceed it
            codes[index, part] = near.astype(codes.dtype)
    return codes.reshape(matrix.shape), scales[0] if block == CHANNEL else scales


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype."""
    return dequantise(ops, stored, block)
