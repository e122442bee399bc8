"""What the vision tower's class token looks at, as transformers' own attention tells."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmtrim.export.oracles.rules import Seen

LOOKS = True  # needs what the vision tower looks at


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    if not len(visual):
        return [], torch.zeros(0)
    assert seen.vision is not None
    return [], seen.vision
