"""Keyformer a second time (arXiv 2403.09054); its noise is the runtime's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmtrim.export.oracles.caches import Choice, View, best, rounded


class Oracle:
    """``policy``: ``recent``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._recent = policy["recent"]

    def scores(self, view: View, noise: Tensor, temperature: float) -> Tensor:
        """[KV, W] of one step; ``noise`` [W]."""
        return view.by_key_head(((view.logits + noise) / temperature).softmax(-1).sum(1))

    def choose(self, views: Sequence[View], share: float, sums: Sequence[Tensor], fresh: int) -> list[Choice]:
        """What stays in every layer by the sums [KV, W]; the last ``fresh`` entries add nothing to what may stay."""
        choices = []
        for view, scores in zip(views, sums, strict=True):
            count = rounded(share, len(view.candidates) - fresh)
            ranking, newest = scores.clone(), rounded(self._recent, count)
            ranking[:, len(view.candidates) - newest :] = 1e30
            choices.append(best(view, ranking, count))
        return choices
