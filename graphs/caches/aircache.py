"""AirCache (arXiv 2503.23956, ICCV 2025): what the most attended words of a question attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring, flag, float_const
from vlmtrim.graphs.keeping import CANDIDATE, TEXT
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class AirCache(Policy):
    """Every layer keeps the visual tokens that an elite window of the question attends to most.

    Rules, per layer: 1. the elite window: the last word, and of the words behind the picture those to which it pays at
    least ``alpha`` of what it pays to any of them (mean over heads); 2. a token's score: the softmax over visual
    tokens and elite words alone, mean over elite rows and heads; 3. the budget: the share, times the mean of two
    numbers that are 1 on average over the layers: the sum of the scores (strength) and their skewness; at most all.
    The paper has the window of all text; here it is of the words behind the picture, at most the last ``window`` of
    them, since what every row attends to (the start token) would else be the only one that reaches ``alpha``.

    Attributes:
        alpha: 0 < alpha <= 1.
        window: words that may be elite.
    """

    alpha: float = flag(0.9, "share of the largest attention that makes a word elite (0.9)")
    window: int = flag(64, "last words of the question that may be elite (64)")

    name: ClassVar[str] = "aircache"
    rows: ClassVar[str] = TEXT
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: give a share above 0, up to 1")
        if self.window < 1:
            raise ValueError(f"window is {self.window}: give the number of words, 1 or more")

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.window

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, 1, W]."""
        ops = scoring.ops
        visual = ops("Equal", scoring.kinds, ops.const(CANDIDATE))  # [B, W]
        valid = ops("GreaterOrEqual", scoring.row_slots, ops.const(0))
        last = ops("Slice", scoring.row_slots, ops.const([-1]), ops.const([np.iinfo(np.int64).max]), ops.const([1]))
        slots = ops("Where", valid, scoring.row_slots, last)  # filling repeats the last row
        mean = ops("ReduceMean", scoring.probabilities, ops.const([1]), keepdims=0)  # [B, R, W]
        paid = ops("Slice", mean, ops.const([-1]), ops.const([np.iinfo(np.int64).max]), ops.const([1]))
        paid = ops("GatherElements", ops("Squeeze", paid, ops.const([1])), slots, axis=1)  # [B, R]
        most = ops("ReduceMax", paid, ops.const([1]), keepdims=1)
        elite = ops("GreaterOrEqual", paid, ops("Mul", most, float_const(ops, self.alpha)))
        elite = ops("Or", elite, ops("Equal", slots, last))
        marks = ops("Cast", elite, to=ir.DataType.FLOAT)
        nothing = ops("Cast", ops("Less", scoring.kinds, ops.const(-9)), to=ir.DataType.FLOAT)
        columns = ops("ScatterElements", nothing, slots, marks, axis=1)
        is_visual = ops("Cast", visual, to=ir.DataType.FLOAT)
        among = ops("Unsqueeze", ops("Max", columns, is_visual), ops.const([1, 2]))
        every = ops("ReduceSum", ops("Mul", scoring.probabilities, among), ops.const([3]), keepdims=1)
        alone = ops("Mul", scoring.probabilities, ops("Unsqueeze", is_visual, ops.const([1, 2])))
        alone = ops("Div", alone, ops("Max", every, float_const(ops, 1e-30)))
        weights = ops("Mul", marks, ops("Cast", valid, to=ir.DataType.FLOAT))
        weights = ops("Div", weights, ops("ReduceSum", weights, ops.const([1]), keepdims=1))
        paid = ops("Mul", alone, ops("Unsqueeze", weights, ops.const([1, 3])))
        return scoring.by_layer(ops("ReduceSum", paid, ops.const([2]), keepdims=0))

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]."""
        ops, judged = budget.ops, budget.is_candidate()
        total = ops("Cast", budget.candidates, to=ir.DataType.FLOAT)
        number = ops("Max", total, float_const(ops, 3.0))  # skewness is of three or more
        strength = _sum(budget, ops("Mul", budget.scores, judged))
        mean = ops("Unsqueeze", ops("Div", strength, number), ops.const([2, 3]))
        apart = ops("Mul", ops("Sub", budget.scores, mean), judged)
        square = ops("Mul", apart, apart)
        one, two = float_const(ops, 1.0), float_const(ops, 2.0)
        variance = ops("Div", _sum(budget, square), ops("Sub", number, one))
        cubes = ops("Div", _sum(budget, ops("Mul", square, apart)), ops("Mul", variance, ops("Sqrt", variance)))
        skewness = ops("Div", number, ops("Mul", ops("Sub", number, one), ops("Sub", number, two)))
        skewness = ops("Mul", skewness, ops("Where", ops("Greater", variance, float_const(ops, 0.0)), cubes, one))
        both = ops("Add", _relative(budget, strength), _relative(budget, skewness))
        share = ops("Mul", ops("Div", both, two), budget.share)
        return budget.of_share(ops("Min", ops("Max", share, float_const(ops, 0.0)), one))


def _sum(budget: Budgeting, values: ir.Value) -> ir.Value:
    """[L, B, 1, W] -> [L, B]."""
    return budget.ops("ReduceSum", values, budget.ops.const([2, 3]), keepdims=0)


def _relative(budget: Budgeting, values: ir.Value) -> ir.Value:
    """[L, B] over its mean of the layers."""
    ops = budget.ops
    mean = ops("ReduceMean", values, ops.const([0]), keepdims=1)
    return ops("Div", values, ops("Max", mean, float_const(ops, 1e-30)))


POLICY = AirCache
