"""Integers out of 32-bit words, and into the arrays of our formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmtrim.graphs.formats import CHANNEL, Packing


def unpack(words: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 words -> uint8 codes, 32 / bits for every word along ``dim``.

    Args:
        order: where among a word's codes those of its lowest bits, of the next, ... belong; None: in that order.
    """
    count = 32 // bits
    shape = [*words.shape[: dim + 1], count, *words.shape[dim + 1 :]]
    codes = torch.empty(shape, dtype=torch.uint8)
    for index in range(count):
        place = index if order is None else order[index]
        codes.select(dim + 1, place).copy_((words >> (index * bits)) & ((1 << bits) - 1))
    return codes.flatten(dim, dim + 1)


def integers(packing: Packing, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
    """Arrays of an integer format.

    Args:
        codes: uint8 [K, N]; a weight is (code - zero) * scale.
        scales: floats [K / block, N].
        zeros: uint8, the same shape; left out where the format has none.
    """
    if packing.block == CHANNEL:
        scales, zeros = scales[0], zeros[0]
    stored = _signed(codes, bits), scales.contiguous()
    if packing.format == "int4_zero":
        return *stored, _signed(zeros, bits)
    if packing.format == "int4_sum":
        return *stored, scales.float() * (zeros.float() - (1 << (bits - 1)))
    return stored


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes less their middle, in two's complement: int8, or two of 4 bits in a byte, the first in the low half."""
    flat = (codes ^ (1 << (bits - 1))).reshape(-1)
    return flat[0::2] | (flat[1::2] << 4) if bits == 4 else flat.view(torch.int8)
