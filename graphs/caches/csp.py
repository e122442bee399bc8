"""CSP, Cross-Self Pruning (arXiv 2412.04652): what text asks of the picture and what the picture asks of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring, flag, float_const
from vlmtrim.graphs.keeping import CANDIDATE
from vlmtrim.graphs.later import ir, select


@dataclass(frozen=True)
class CSP(Policy):
    """Every key head keeps visual tokens by two rankings: rows of text (cross) and rows of the picture (self).

    Score: sum over the last ``recent`` of the step's tokens of softmax_1, ``exp(x) / (1 + sum exp(x))``, mean over the
    query heads of a key head. The best by self-attention stay first, then of the others the best by cross-attention.
    The published code takes the two sets apart and counts twice what is in both; here nothing is. Where no row is of
    the picture, or none is text, the other ranking takes all. In the paper ``cross`` is tuned task by task.

    Attributes:
        recent: share of the step's tokens that are rows.
        cross: share of the budget that is ranked by text.
        window: rows at most.
    """

    recent: float = flag(0.1, "last tokens of the prompt whose attention counts, as a share (0.1)")
    cross: float = flag(0.5, "share of the budget that rows of text rank, the others those of the picture (0.5)")
    window: int = flag(64, "rows at most (64)")

    name: ClassVar[str] = "csp"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.recent <= 1 or not 0 <= self.cross <= 1:
            raise ValueError(f"recent is {self.recent}, cross {self.cross}: give shares, recent above 0")
        if self.window < 1:
            raise ValueError(f"window is {self.window}: give the number of rows, 1 or more")

    @property
    def part(self) -> float:  # type: ignore[override]
        """Share of the step's tokens that are rows at most."""
        return self.recent

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.window

    def maps(self, kv_heads: int) -> int:
        """Two rankings a key head."""
        return 2 * kv_heads

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, 2 KV, W]: by rows of text, then by rows of the picture."""
        ops = scoring.ops
        top = ops("Max", ops("ReduceMax", scoring.logits, ops.const([3]), keepdims=1), float_const(ops, 0.0))
        each = ops("Exp", ops("Sub", scoring.logits, top))
        rest = ops("Exp", ops("Neg", top))
        paid = ops("Div", each, ops("Add", rest, ops("ReduceSum", each, ops.const([3]), keepdims=1)))
        slots = ops("Max", scoring.row_slots, ops.const(0))
        kinds = ops("GatherElements", scoring.kinds, slots, axis=1)
        of_picture = ops("Cast", ops("Equal", kinds, ops.const(CANDIDATE)), to=ir.DataType.FLOAT)
        of_picture = ops("Unsqueeze", of_picture, ops.const([1, 3]))  # [B, 1, R, 1]
        itself = scoring.by_head(scoring.received(ops("Mul", paid, of_picture)))
        text = ops("Mul", paid, ops("Sub", float_const(ops, 1.0), of_picture))
        return ops("Concat", scoring.by_head(scoring.received(text)), itself, axis=1)

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, KV, W]."""
        ops, judged = budget.ops, budget.is_candidate()
        cross, itself = budget.both()
        quota = ops("Mul", ops("Cast", counts, to=ir.DataType.FLOAT), float_const(ops, 1 - self.cross))
        quota = ops("Unsqueeze", ops("Round", quota), ops.const([2, 3]))  # [L, B, 1, 1]
        asked = ops("ReduceSum", ops("Mul", cross, judged), ops.const([3]), keepdims=1)
        asks = ops("ReduceSum", ops("Mul", itself, judged), ops.const([3]), keepdims=1)
        nothing, all_ = (
            float_const(ops, 0.0),
            ops("Unsqueeze", ops("Cast", counts, to=ir.DataType.FLOAT), ops.const([2, 3])),
        )
        quota = ops("Where", ops("Greater", asked, nothing), quota, all_)
        quota = ops("Where", ops("Greater", asks, nothing), quota, nothing)  # [L, B, KV, 1]
        hidden = ops("Where", ops("Greater", judged, nothing), itself, float_const(ops, -1.0))
        shape, window = ops("Shape", itself), ops.dim(itself, 3)
        flat = ops("Reshape", hidden, ops.concat(ops.const([-1]), window))
        best = select.top(ops, flat, window, budget.longest, largest=True)
        place = ops("Range", ops.const(0), ops("Squeeze", window, ops.const([0])), ops.const(1))
        place = ops("Cast", place, to=ir.DataType.FLOAT)
        chosen = ops("Cast", ops("Less", place, ops("Reshape", quota, ops.const([-1, 1]))), to=ir.DataType.FLOAT)
        chosen = ops("ScatterElements", ops("Mul", flat, nothing), best, chosen, axis=1)
        chosen = ops("Reshape", chosen, shape)
        return ops("Where", ops("Greater", chosen, nothing), ops.const(np.float32(1e30), np.float32), cross)


POLICY = CSP
