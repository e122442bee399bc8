"""VL-Cache a second time (arXiv 2410.23317)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles.caches import Choice, View, best, rounded


class Oracle:
    """``policy``: ``threshold``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._threshold = policy["threshold"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        density = torch.stack([self._density(view) for view in views])
        shares = (density / density.sum() * share * len(views)).clamp(0.01, 1)
        return [
            best(view, view.attention.sum(1).mean(0)[None], rounded(float(own), int(view.candidates.sum())))
            for view, own in zip(views, shares, strict=True)
        ]

    def _density(self, view: View) -> Tensor:
        paid = view.attention
        dense = (paid >= self._threshold * paid.amax(-1, keepdim=True)) & view.seen
        return (dense.sum(-1) / view.seen.sum(-1)).mean()
