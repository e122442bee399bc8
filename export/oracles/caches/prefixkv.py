"""PrefixKV a second time (arXiv 2412.03409): the table's shares, interpolated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmtrim.export.oracles.caches import Choice, View, best, rounded


class Oracle:
    """``policy``: ``table``."""

    def __init__(self, policy: Mapping[str, Any]):
        self._table = policy["table"]

    def choose(self, views: Sequence[View], share: float) -> list[Choice]:
        """What stays in every layer."""
        shares = [share] * len(views)
        if self._table is not None:
            tenths = np.linspace(0, 1, len(self._table))
            shares = [float(np.interp(share, tenths, column)) for column in np.array(self._table).T]
        return [
            best(view, view.attention.sum(1).mean(0)[None], rounded(own, int(view.candidates.sum())))
            for view, own in zip(views, shares, strict=True)
        ]
