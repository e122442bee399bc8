"""SCOPE a second time (arXiv 2412.13649)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmtrim.export.oracles.caches import Choice, View, best


class Oracle:
    """``policy``: ``window`` and ``recent``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._window, self._recent = policy["window"], policy["recent"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer; ``share`` changes nothing."""
        del share
        choices = []
        for view in views:
            ranking, said = view.attention.sum(1).mean(0), torch.nonzero(view.candidates)[:, 0]
            ranking[said[-self._recent :]] = 10.0
            choices.append(best(view, ranking[None], min(self._window, len(said))))
        return choices
