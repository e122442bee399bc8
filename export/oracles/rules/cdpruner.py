"""The picks of dpp under a kernel whose rows and columns are scaled by the mean cosine to the text, from 0 to 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmtrim.export.oracles.rules import Seen, dpp


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.embeds is not None
    states = normalize(seen.embeds.double(), dim=1)
    is_text = torch.ones(len(states), dtype=torch.bool)
    is_text[visual] = False
    if not len(visual):
        return [], torch.zeros(0)
    relevance = (states[visual] @ states[is_text].T).mean(dim=1)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (states[visual] @ states[visual].T) * relevance[None]
    return dpp.picks(kernel, count), torch.zeros(len(visual))
