"""The sixteen values of e2m1 (OCP MX v1.0, 5.3.3), times an e4m3 scale a block, times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import codes, spread

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    scales = stored[f"{name}.nvfp4_scale"].to(torch.float32)
    floats = VALUES[codes(stored[f"{name}.nvfp4"], scales.shape[-1]).long()]
    return floats * spread(scales, floats.shape[1]) * stored[f"{name}.nvfp4_global"].to(torch.float32)
