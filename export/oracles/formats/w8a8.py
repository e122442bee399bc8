"""A signed byte, times its column's scale; activations stay floats here, so that what rounding them costs is seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    return stored[f"{name}.w8a8"].t().to(torch.float32) * stored[f"{name}.w8a8_scale"].to(torch.float32)[:, None]
