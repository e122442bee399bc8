"""Two's complement in four bits times a scale, less an offset a block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmtrim.export.oracles.formats import codes, spread


def restore(stored: Mapping[str, Tensor], name: str) -> Tensor:
    """float32 [N, K]."""
    scales, offsets = stored[f"{name}.int4_sum_scale"], stored[f"{name}.int4_sum_offset"]
    unsigned = codes(stored[f"{name}.int4_sum"], scales.shape[-1]).to(torch.float32)
    signed = torch.where(unsigned > 7, unsigned - 16, unsigned)
    return signed * spread(scales, unsigned.shape[1]) - spread(offsets, unsigned.shape[1])
