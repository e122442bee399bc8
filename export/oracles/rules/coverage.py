"""Half at a uniform stride, the others by the attention of the last query row."""

from __future__ import annotations

from torch import Tensor

from vlmtrim.export.oracles.rules import Seen, last_row, strided


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    return strided(count // 2, len(visual), seed), last_row.rank(seen, visual, count, seed)[1]
