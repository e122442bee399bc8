"""nvfp4: floats of 4 bits (e2m1) in blocks of 16 whose scales are FP8 under one float; engines only, for Blackwell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlmtrim.graphs.formats import Array, nibbles

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

BITS = 4
BLOCKS = (16,)
ENGINES_ONLY = True  # ONNX Runtime has no kernel for DequantizeLinear of them
LARGEST, LARGEST_SCALE = 6.0, 448.0  # of e2m1 and e4m3


def arrays(inputs: int, outputs: int, block: int, dtype: str) -> tuple[Array, ...]:
    """float4e2m1 [K, N], scales float8e4m3fn [K / 16, N] and their own scale []."""
    return (
        Array("nvfp4", "float4e2m1", (inputs, outputs)),
        Array("nvfp4_scale", "float8e4m3fn", (inputs // block, outputs)),
        Array("nvfp4_global", dtype, ()),
    )


def pack(matrix: np.ndarray, block: int, dtype: str) -> tuple[np.ndarray, ...]:
    """float32 [K, N] -> (nibbles uint8 [K * N / 2], scales [K / 16, N], their scale [])."""
    import ml_dtypes

    from vlmtrim.graphs.formats.scales import DTYPES

    blocks = matrix.reshape(-1, block, matrix.shape[1])
    largest = np.abs(blocks).max(axis=1) / np.float32(LARGEST)
    smallest = np.float32(ml_dtypes.finfo(DTYPES[dtype]).smallest_normal)
    whole = np.maximum(largest.max() / np.float32(LARGEST_SCALE), smallest).astype(DTYPES[dtype])
    wide = whole.astype(np.float32)
    limited = np.minimum(largest / wide, LARGEST_SCALE)
    scales = limited.astype(ml_dtypes.float8_e4m3fn)
    steps = scales.astype(np.float32) * wide
    steps = np.where(steps == 0, np.float32(1), steps)  # a block too small for its scale holds zeros
    codes = np.empty(blocks.shape, np.uint8)
    for index, part in enumerate(blocks):
        near = np.clip(part / steps[index], -LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn)
        codes[index] = near.view(np.uint8)
    return nibbles(codes), scales, np.asarray(whole)


def restore(ops: Ops, stored: tuple[ir.Value, ...], block: int) -> ir.Value:
    """The matrix [K, N] in the dtype of the scales' scale."""
    codes, scales, whole = stored
    return ops("DequantizeLinear", codes, ops("DequantizeLinear", scales, whole), axis=0, block_size=block)
