"""A signed byte, times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import spread


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    integers = stored[f"{name}.int8"].t().to(torch.float32)
    return integers * spread(stored[f"{name}.int8_scale"], integers.shape[1])
