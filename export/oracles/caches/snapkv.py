"""SnapKV a second time (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmtrim.export.oracles.caches import Choice, View, uniform


class Oracle:
    """``policy``: ``pool``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._pool = policy["pool"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        rankings = []
        for view in views:
            paid = view.by_key_head(view.attention.sum(1))
            rankings.append(torch.nn.functional.max_pool1d(paid[None], self._pool, 1, self._pool // 2)[0])
        return uniform(views, rankings, share)
