"""The random choice a second time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlmtrim.export.oracles.caches import Choice, View, uniform


class Oracle:
    """``policy``: ``seed``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._seed = policy["seed"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        heads, entries = len(views[0].keys), max(view.keys.shape[1] for view in views)
        drawn = np.random.default_rng(self._seed).random(entries + 101 * heads * len(views), dtype=np.float32)
        rankings = []
        for layer, view in enumerate(views):
            begins = [101 * (layer * heads + head) for head in range(heads)]
            rankings.append(torch.stack([torch.from_numpy(drawn[i : i + view.keys.shape[1]]) for i in begins]))
        return uniform(views, rankings, share)
