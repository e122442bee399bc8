"""Two's complement in four bits, less a zero point in the same, times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import codes, spread


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    scales = stored[f"{name}.int4_zero_scale"]
    weights = _signed(codes(stored[f"{name}.int4_zero"], scales.shape[-1]))
    points = _signed(codes(stored[f"{name}.int4_zero_point"], scales.shape[-1])).t()
    points = points[0] if scales.ndim == 1 else points
    return (weights - spread(points, weights.shape[1])) * spread(scales, weights.shape[1])


def _signed(unsigned: Tensor) -> Tensor:
    values = unsigned.to(torch.float32)
    return torch.where(values > 7, values - 16, values)
