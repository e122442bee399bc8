"""Greedy picks by the determinant of the picked tokens' cosines, through the Schur complement of every candidate.

In steps of a percent down to 1 / 1000; of equals the first.
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
    return picks(states @ states.T, count), torch.zeros(len(visual))


def picks(kernel: Tensor, count: int) -> list[int]:
    """Indices in the order in which they are picked."""
    chosen: list[int] = []
    for _ in range(count):
        gains = kernel.diagonal().clone()
        if chosen:
            between = kernel[chosen]  # [picked, N]
            inner = kernel[chosen][:, chosen] + 1e-9 * torch.eye(len(chosen))  # tokens may be equal
            gains -= (between * torch.linalg.solve(inner, between)).sum(dim=0)
        gains = (gains.clamp(min=1e-3).log() * 64).round()
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
    return chosen
