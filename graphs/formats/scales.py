"""Scales of blocks of integers: the largest magnitude, or the clipping that comes nearest."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from vlmtrim.graphs.formats import CHANNEL, SLICE

WORKERS = min(4, len(os.sched_getaffinity(0)))  # each holds some copies of a slice
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def symmetric(
    matrix: np.ndarray,
    block: int,
    dtype: str,
    low: int,
    high: int,
    shrink: Sequence[float],
    importance: np.ndarray | None = None,
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
    weights = counts.reshape(-1, length, 1)
    columns = max(1, min(outputs, SLICE // length))
    step = max(1, SLICE // (length * columns))

    def find(place: tuple[int, int]) -> None:
        rows, some = slice(place[0], place[0] + step), slice(place[1], place[1] + columns)
        found = _nearest(np.ascontiguousarray(blocks[rows, :, some]), weights[rows], scales.dtype, low, high, shrink)
        integers[rows, :, some], scales[rows, some] = found

    places = itertools.product(range(0, len(blocks), step), range(0, outputs, columns))
    with ThreadPoolExecutor(WORKERS) as pool:  # numpy computes outside of Python's lock
        list(pool.map(find, places))
    return integers.reshape(inputs, outputs), scales[0] if block == CHANNEL else scales


def _nearest(
    blocks: np.ndarray, counts: np.ndarray, dtype: np.dtype, low: int, high: int, shrink: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Of [b, length, N] with counts [b, length, 1]: (int8 of the same shape, scales [b, N])."""
    largest = np.abs(blocks).max(axis=1)
    smallest = np.float32(ml_dtypes.finfo(dtype).smallest_normal)
    tried = np.empty_like(blocks)
    best = scales = None
    for share in shrink if len(shrink) > 1 else ():
        scale = np.maximum(largest * np.float32(share / high), smallest).astype(dtype)
        _round(blocks, scale, low, high, tried)
        tried *= scale.astype(np.float32)[:, None]
        tried -= blocks
        error = np.einsum("bln,bln,bl->bn", tried, tried, counts[..., 0])
        if best is None or scales is None:
            best, scales = error, scale
        else:
            scales = np.where(error < best, scale, scales)
            np.minimum(best, error, out=best)
    if scales is None:
        scales = np.maximum(largest / np.float32(high), smallest).astype(dtype)
    return _round(blocks, scales, low, high, tried).astype(np.int8), scales


def _round(blocks: np.ndarray, scales: np.ndarray, low: int, high: int, out: np.ndarray) -> np.ndarray:
    np.divide(blocks, scales.astype(np.float32)[:, None], out=out)
    np.rint(out, out=out)
    return np.clip(out, low, high, out=out)
