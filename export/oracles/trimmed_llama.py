"""Trimmed-Llama a second time, from the paper's rules (arXiv 2504.00557).

Each head of the first cross-attention layer names the ``round(ratio * n)`` features that the text attends to most; the
union of them, cut to the bound, is what stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Oracle:
    """``selection``: ``ratio`` and ``bound``."""

    def __init__(self, selection: Mapping[str, Any]):
        self._ratio, self._bound = selection["ratio"], selection["bound"]

    def choose(self, scores: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending features that stay, and the margin of every one [N]; ``scores`` [H, N].

        The margin is by how much of its threshold a head's score would have to change for the feature to change sides:
        to leave, in every head that chose it; to enter, in any. Infinite for filling, and where the bound cut.
        """
        count = max(1, round(self._ratio * int(alive.sum())))
        scores = scores.masked_fill(~alive, -1.0)
        ranked = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
        limit = int(self._bound * len(alive) + 1e-9)
        union: dict[int, None] = {}
        for feature in ranked.T.flatten().tolist():  # best rank first, then head
            if len(union) < limit:
                union.setdefault(feature)
        kept = torch.tensor(sorted(union), dtype=torch.int64)
        chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, ranked, True)
        infinite = torch.tensor(torch.inf)
        worst = torch.where(chosen, scores, infinite).amin(1, keepdim=True)
        best_left = torch.where(chosen | ~alive, -infinite, scores).amax(1, keepdim=True)
        leaving = torch.where(chosen, (scores - best_left) / worst, -infinite).amax(0)
        entering = ((worst - scores) / worst).amin(0)
        margins = torch.where(chosen.any(0), leaving, entering)
        uncut = len(kept) == int(chosen.any(0).sum())
        return kept, torch.where(alive & uncut, margins, infinite)
