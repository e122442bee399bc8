"""KeyDiff a second time (arXiv 2504.15364)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmtrim.export.oracles.caches import Choice, View, uniform


class Oracle:
    """``policy``: nothing of it."""

    def __init__(self, policy: Mapping[str, Any]):
        del policy

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        rankings = []
        for view in views:
            keys = torch.nn.functional.normalize(view.keys, dim=-1)
            anchor = keys[:, view.candidates].mean(1, keepdim=True)
            rankings.append(-torch.cosine_similarity(keys, anchor, dim=-1))
        return uniform(views, rankings, share)
