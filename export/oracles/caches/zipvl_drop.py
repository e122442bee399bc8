"""ZipVL's cache a second time (arXiv 2410.08584)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmtrim.export.oracles.caches import Choice, View, best


class Oracle:
    """``policy``: nothing of it."""

    def __init__(self, policy: Mapping[str, Any]):
        del policy

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer; ``share`` is of the attention."""
        choices = []
        for view in views:
            paid = view.attention.sum(1).mean(0)
            given_up = torch.cumsum(paid[view.candidates].sort().values, 0) <= (1 - share) * len(view.slots)
            count = int(view.candidates.sum() - given_up.sum())
            choices.append(best(view, (paid / view.seen.sum(0).clamp(min=1))[None], count))
        return choices
