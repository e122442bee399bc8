"""AirCache a second time (arXiv 2503.23956): softmax over visual tokens and elite words, as the paper writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles.caches import Choice, View, best, rounded


class Oracle:
    """``policy``: ``alpha``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._alpha = policy["alpha"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        scores = [self._scores(view) for view in views]
        judged = [score[view.candidates] for score, view in zip(scores, views, strict=True)]
        strength = torch.stack([paid.sum() for paid in judged])
        skewness = torch.stack([_skewness(paid) for paid in judged])
        shares = (strength / strength.mean() + skewness / skewness.mean()) / 2 * share
        return [
            best(view, score[None], rounded(float(own.clamp(0, 1)), int(view.candidates.sum())))
            for view, score, own in zip(views, scores, shares, strict=True)
        ]

    def _scores(self, view: View) -> Tensor:
        last = view.attention.mean(0)[-1, view.slots]  # what the last word pays to the words
        words = torch.arange(len(last))
        elite = words[(last >= self._alpha * last.max()) | (words == len(last) - 1)]
        among = view.candidates.clone()
        among[view.slots[elite]] = True
        return view.logits[:, elite].masked_fill(~among, -torch.inf).softmax(-1).mean((0, 1))


def _skewness(values: Tensor) -> Tensor:
    n, apart = len(values), values - values.mean()
    deviation = (apart.square().sum() / (n - 1)).sqrt()
    return n / ((n - 1) * (n - 2)) * (apart / deviation).pow(3).sum()
