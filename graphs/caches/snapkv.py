"""SnapKV (arXiv 2404.14469): what the last tokens of the prompt attend to, key head by key head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Policy, Scoring, flag
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class SnapKV(Policy):
    """Every key head keeps the visual tokens that the last rows of the prompt attend to most.

    Score: sum over the last ``window`` rows of the attention's softmax, mean over the query heads of a key head, then
    the largest of ``pool`` neighbours, as the paper pools to keep what belongs together.

    Attributes:
        window: rows.
        pool: neighbours, an odd number; 1 pools nothing. The paper's 7 is for text: in a picture, neighbours in the
            sequence are those of a row only.
    """

    window: int = flag(8, "last tokens of the prompt whose attention counts (8)")
    pool: int = flag(1, "neighbours that lend each other their score, an odd number (1: none; the paper's 7)")

    name: ClassVar[str] = "snapkv"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}: give the number of rows, 1 or more")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}: give an odd number of neighbours, 1 or more")

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.window

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, KV, W]."""
        scores = super().score(scoring)
        if self.pool == 1:
            return scores
        side = self.pool // 2
        return scoring.ops("MaxPool", scores, kernel_shape=[self.pool], pads=[side, side], strides=[1])


POLICY = SnapKV
