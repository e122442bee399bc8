"""Scales of blocks of integers: the largest magnitude, or the clipping that comes nearest."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from vlmtrim.graphs.formats import CHANNEL, SLICE

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def symmetric(
    matrix: np.ndarray,
    block: int,
    dtype: str,
    low: int,
    high: int,
    shrink: Sequence[float],
    importance: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Integers ``low`` to ``high`` and their scales, such that ``integers * scales`` comes near a matrix.

    Args:
        matrix: float32 [K, N].
        block: length of a block along K, or CHANNEL.
        dtype: of the scales; integers are rounded by the scales as they are stored.
        shrink: shares of a block's largest magnitude to try as the largest that can be told; the one with the least
            squared error stays, since clipping one outlier may serve all others.
        importance: float32 [K], what a squared error in each row counts; None for all the same.

    Returns:
        (int8 [K, N], scales [K / block, N], or [N] for CHANNEL).
    """
    inputs, outputs = matrix.shape
    length = inputs if block == CHANNEL else block
    counts = np.ones(inputs, np.float32) if importance is None else importance.astype(np.float32)
    integers = np.empty((inputs // length, length, outputs), np.int8)
    scales = np.empty((inputs // length, outputs), DTYPES[dtype])
    blocks = matrix.reshape(-1, length, outputs)
    step = max(1, SLICE // (length * outputs))
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        weights = counts.reshape(-1, length, 1)[part]
        integers[part], scales[part] = _nearest(blocks[part], weights, scales.dtype, low, high, shrink)
    return integers.reshape(inputs, outputs), scales[0] if block == CHANNEL else scales


def _nearest(
    blocks: np.ndarray, counts: np.ndarray, dtype: np.dtype, low: int, high: int, shrink: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Of [b, length, N] with counts [b, length, 1]: (int8 of the same shape, scales [b, N])."""
    largest = np.abs(blocks).max(axis=1)
    smallest = np.float32(ml_dtypes.finfo(dtype).smallest_normal)
    best = codes = scales = None
    for share in shrink:
        scale = np.maximum(largest * np.float32(share / high), smallest).astype(dtype)
        wide = scale.astype(np.float32)[:, None]
        tried = np.clip(np.rint(blocks / wide), low, high)
        if len(shrink) == 1:
            return tried.astype(np.int8), scale
        error = (counts * np.square(tried * wide - blocks)).sum(axis=1)
        if best is None:
            best, codes, scales = error, tried.astype(np.int8), scale
            continue
        assert codes is not None and scales is not None
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
        np.copyto(codes, tried.astype(np.int8), where=better[:, None])
    assert codes is not None and scales is not None
    return codes, scales
