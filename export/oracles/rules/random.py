"""Numbers of numpy's generator, the same in every step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    return [], torch.from_numpy(np.random.default_rng(seed).random(len(visual), dtype=np.float32))
