"""Farthest-point picks by 1 - cosine of the embeddings; the first has the farthest nearest neighbour.

In steps of 1 / 1024; of equals the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.embeds is not None
    states = normalize(seen.embeds[visual].double(), dim=1)
    distances = 1 - states @ states.T
    chosen: list[int] = []
    for _ in range(count):
        if chosen:
            gaps = distances[:, chosen].min(dim=1).values
            gaps[chosen] = -1
        else:
            gaps = (distances + 9 * torch.eye(len(visual))).min(dim=1).values
        chosen.append(int((gaps * 1024).round().argmax()))
    return chosen, torch.zeros(len(visual))
