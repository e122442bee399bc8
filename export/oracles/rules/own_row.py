"""The last token's attention in the layer behind the selection, run on all tokens of the step for once."""

from __future__ import annotations

from torch import Tensor

from vlmtrim.export.oracles.rules import Seen


def rank(seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
    """See the package."""
    assert seen.ahead is not None
    return [], seen.ahead()[:, -1].mean(dim=0)[visual]
