"""PyTorch's own e4m3, times a scale a column."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import spread


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    floats = stored[f"{name}.fp8"].t().to(torch.float32)
    return floats * spread(stored[f"{name}.fp8_scale"], floats.shape[1])
