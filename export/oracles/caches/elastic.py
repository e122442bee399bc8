"""Elastic Cache a second time (arXiv 2407.18121); merging is the reference's (``merge``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmtrim.export.oracles.caches import Choice, View, uniform


class Oracle:
    """``policy``: nothing of it."""

    def __init__(self, policy: Mapping[str, Any]):
        del policy

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        return uniform(views, [view.attention.sum(1).mean(0)[None] for view in views], share)
