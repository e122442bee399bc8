"""Three rounds of Sinkhorn between what enters the scoring layer and what its second norm returns, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmtrim.export.oracles.rules import Seen, places


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.entered is not None and seen.normed is not None and seen.side is not None
    source, target = seen.entered[visual].double(), seen.normed[visual].double()
    place = (torch.tensor(places(seen, visual), dtype=torch.float64).view(-1, 3)[:, 1:] + 0.5) / seen.side
    cost = torch.cdist(normalize(source, dim=1), normalize(target, dim=1)) ** 2
    cost = cost + 1 - torch.exp(-(torch.cdist(place, place) ** 2) / (2 * 0.25**2))
    cost = cost + 0.01 * (place - 0.5).norm(dim=1)[:, None]
    kernel = torch.exp(-cost / 0.1)
    rows, columns = (states.norm(dim=1) / states.norm(dim=1).sum() for states in (source, target))
    v = torch.ones_like(columns)
    u = v
    for _ in range(3):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return [], (u * (kernel @ v)).float()
