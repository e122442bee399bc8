"""The best tokens by the last row of every cell, then the second best of each, and so on."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from vlmtrim.export.oracles.rules import Seen, last_row, places


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    attention = last_row.rank(seen, visual, count, seed)[1]
    side = 2
    while (side + 1) ** 2 * (1 - seen.removed) <= 1 + 1e-9:
        side += 1
    cells = defaultdict(list)
    for token in attention.sort(descending=True, stable=True).indices.tolist():
        picture, row, column = places(seen, visual)[token]
        cells[picture, row // side, column // side].append(token)
    turn = torch.zeros(len(visual))
    for tokens in cells.values():
        turn[tokens] = torch.arange(len(tokens), dtype=torch.float32)
    return [], attention - turn
