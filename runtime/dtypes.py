"""Arrays of the contract's dtypes. numpy has no bfloat16, so its bits travel as uint16 under their name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.contract import DTYPE_BYTES


@dataclass(frozen=True)
class BFloat16:
    """A bfloat16 array on the host as its bits, uint16."""

    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.bits.shape


HostArray = np.ndarray | BFloat16


def cast(array: np.ndarray, dtype: str) -> HostArray:
    """A float32 array in a dtype of the contract; bfloat16 rounds to nearest, ties to even, and keeps NaN."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    words = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((words.astype(np.uint64) + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return BFloat16(np.where(np.isnan(array), np.uint16(0x7FC0), rounded))


def zeros(shape: tuple[int, ...], dtype: str) -> HostArray:
    """Zeros in a dtype of the contract."""
    return BFloat16(np.zeros(shape, np.uint16)) if dtype == "bfloat16" else np.zeros(shape, dtype)


def raw(array: HostArray) -> np.ndarray:
    """The bytes of an array in order, uint8 [n]."""
    bits = array.bits if isinstance(array, BFloat16) else array
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8)


def from_raw(data: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """uint8 [n] -> an array of the dtype, float32 for bfloat16, which holds every value of it."""
    if dtype != "bfloat16":
        return data.view(dtype).reshape(shape)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)


def describe(array: HostArray) -> tuple[tuple[int, ...], str]:
    """(shape, dtype name)."""
    return array.shape, "bfloat16" if isinstance(array, BFloat16) else array.dtype.name


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of an array of that shape and dtype."""
    size = DTYPE_BYTES[dtype]
    for dim in shape:
        size *= dim
    return size
