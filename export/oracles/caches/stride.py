"""The stride a second time: of n candidates number j stays where the next multiple of n / k begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmtrim.export.oracles.caches import Choice, View, best, rounded


class Oracle:
    """``policy``: nothing of it."""

    def __init__(self, policy: Mapping[str, Any]):
        del policy

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        choices = []
        for view in views:
            slots = torch.nonzero(view.candidates)[:, 0].tolist()
            count = rounded(share, len(slots))
            ranking = torch.zeros(1, len(view.candidates))
            for i in range(count):  # the i-th of those that stay is number ceil(i n / k)
                ranking[0, slots[-(-i * len(slots) // count)]] = 1.0
            choices.append(best(view, ranking, count))
        return choices
