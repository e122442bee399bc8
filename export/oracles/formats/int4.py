"""Two's complement in four bits, times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import codes, spread


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    scales = stored[f"{name}.int4_scale"]
    unsigned = codes(stored[f"{name}.int4"], scales.shape[-1]).to(torch.float32)
    return torch.where(unsigned > 7, unsigned - 16, unsigned) * spread(scales, unsigned.shape[1])
