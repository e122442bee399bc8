"""CSP a second time (arXiv 2412.04652)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles.caches import Choice, View, rounded


class Oracle:
    """``policy``: ``cross``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._cross = policy["cross"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        return [self._layer(view, rounded(share, int(view.candidates.sum()))) for view in views]

    def _layer(self, view: View, count: int) -> Choice:
        exponents = view.logits.double().exp()
        paid = (exponents / (1 + exponents.sum(-1, keepdim=True))).float()
        of_picture = view.candidates[view.slots]
        cross, itself = (view.by_key_head(paid[:, rows].sum(1)) for rows in (~of_picture, of_picture))
        quota = rounded(1 - self._cross, count) if (~of_picture).any() else count
        quota = quota if of_picture.any() else 0
        kept, ranking = [], []
        for asked, asks in zip(cross, itself, strict=True):
            first = _order(view, asks)[:quota]
            rest = [slot for slot in _order(view, asked) if slot not in first][: count - quota]
            kept.append(torch.tensor(sorted([*first, *rest, *torch.nonzero(~view.candidates)[:, 0].tolist()])))
            ranking.append(asked)
        return Choice(torch.stack(kept), torch.stack(ranking))


def _order(view: View, scores: Tensor) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices
    return [slot for slot in order.tolist() if view.candidates[slot]]
