"""The last query row's attention from projections that were not rotated, over the tokens of this step."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.query is not None and seen.key is not None
    heads, groups = (states.unflatten(1, (-1, seen.head_size)) for states in (seen.query, seen.key))
    groups = groups.repeat_interleave(heads.shape[1] // groups.shape[1], dim=1)
    logits = torch.einsum("hd,shd->hs", heads[-1], groups) * seen.scale
    return [], logits.softmax(-1).mean(0)[visual]
