"""Softmax attention of the last query row, mean over heads, at the visual tokens."""

from __future__ import annotations

from torch import Tensor

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.attention is not None
    row = seen.attention.mean(dim=0)[-1]
    return [], row[-seen.attention.shape[1] :][visual]
