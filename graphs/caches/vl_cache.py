"""VL-Cache (arXiv 2410.23317): what the words behind the picture attend to, more in layers whose attention is dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring, flag, float_const
from vlmtrim.graphs.keeping import TEXT
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class VLCache(Policy):
    """Every layer keeps the visual tokens that the words behind the picture attend to most.

    Score: sum over the last ``window`` of these rows, mean over heads. A layer's density is the share of what its rows
    see that gets at least ``threshold`` of the row's largest attention; the budget is the share, times the density over
    its mean of the layers, at least 1 % and at most all. The paper's recent window is text, which stays here anyway.

    Attributes:
        window: rows at most.
        threshold: of the row's largest attention, 0 < threshold < 1.
    """

    window: int = flag(64, "last words of the question whose attention counts (64)")
    threshold: float = flag(0.01, "share of a row's largest attention below which it counts as none (0.01)")

    name: ClassVar[str] = "vl-cache"
    rows: ClassVar[str] = TEXT
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 < self.threshold < 1:
            raise ValueError(f"window is {self.window}, threshold {self.threshold}: give rows and a share below 1")

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.window

    def maps(self, kv_heads: int) -> int:
        """Scores, and how dense the attention to each entry is."""
        return 2

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, 2, W]: scores; and each entry's part of the density, whose sum is the layer's."""
        ops, paid = scoring.ops, scoring.probabilities
        scores = scoring.by_layer(scoring.received(paid))
        least = ops("Mul", ops("ReduceMax", paid, ops.const([3]), keepdims=1), float_const(ops, self.threshold))
        dense = ops("Cast", ops("And", ops("GreaterOrEqual", paid, least), scoring.seen), to=ir.DataType.FLOAT)
        seen = ops("ReduceSum", ops("Cast", scoring.seen, to=ir.DataType.FLOAT), ops.const([3]), keepdims=1)
        dense = ops("Div", dense, ops("Max", seen, float_const(ops, 1.0)))
        rows = ops("ReduceSum", scoring.weights, ops.const([2]), keepdims=0)  # [B, 1, 1]
        dense = ops("Div", scoring.by_layer(scoring.received(dense)), ops("Max", rows, float_const(ops, 1.0)))
        return ops("Concat", scores, dense, axis=1)

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]."""
        ops = budget.ops
        density = ops("ReduceSum", budget.both()[1], ops.const([2, 3]), keepdims=0)  # [L, B]
        mean = ops("ReduceMean", density, ops.const([0]), keepdims=1)
        share = ops("Mul", ops("Div", density, ops("Max", mean, float_const(ops, 1e-30))), budget.share)
        return budget.of_share(ops("Min", ops("Max", share, float_const(ops, 0.01)), float_const(ops, 1.0)))

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, 1, W]."""
        return budget.both()[0]


POLICY = VLCache
