"""The best by topv, and every fourth of the others, as many together as stay."""

from __future__ import annotations

from torch import Tensor

from vlmtrim.export.oracles.rules import Seen, topv


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    scores = topv.rank(seen, visual, count, seed)[1]
    order = scores.sort(descending=True, stable=True).indices.tolist()
    for best in range(count, -1, -1):
        back = sorted(order[best:])[::4]
        if best + len(back) <= count:
            break
    return [*order[:best], *back], scores
