"""ZipVL's cache (arXiv 2410.08584), after the prefill: as many entries as hold a share of every layer's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring, flag, float_const
from vlmtrim.graphs.keeping import PROBE
from vlmtrim.graphs.later import ir, select


@dataclass(frozen=True)
class ZipVLDrop(Policy):
    """Every layer keeps as many visual tokens as its attention asks for; ``--cache-share`` is of the ATTENTION here.

    Score: sum over ``probe`` rows at a uniform stride, the last one among them, mean over heads. As many visual tokens
    of smallest sum are given up as hold at most 1 - share of all attention; those of highest sum over the rows that see
    them stay. Method zipvl does so before it computes; this policy after, so that the prefill is exact.

    Attributes:
        probe: rows in place of all rows.
    """

    probe: int = flag(32, "rows of the prompt, at a uniform stride, whose attention counts (32)")

    name: ClassVar[str] = "zipvl-drop"
    rows: ClassVar[str] = PROBE
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.probe < 1:
            raise ValueError(f"probe is {self.probe}: give the number of rows, 1 or more")

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.probe

    def maps(self, kv_heads: int) -> int:
        """Accumulated and normalised scores."""
        return 2

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, 2, W]: sums over the rows, and they over the rows that see the entry."""
        ops = scoring.ops
        paid = scoring.by_layer(scoring.received(scoring.probabilities))
        seen = ops("Mul", ops("Cast", scoring.seen, to=ir.DataType.FLOAT), scoring.weights)
        rows = ops("Max", ops("ReduceSum", seen, ops.const([2]), keepdims=0), float_const(ops, 1.0))  # [B, 1, W]
        return ops("Concat", paid, ops("Div", paid, rows), axis=1)

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]."""
        ops = budget.ops
        paid = budget.both()[0]
        every = ops("ReduceSum", paid, ops.const([3]), keepdims=0)  # [L, B, 1]: rows
        spare = ops("Mul", ops("Squeeze", every, ops.const([2])), ops("Sub", float_const(ops, 1.0), budget.share))
        judged = ops("Greater", budget.is_candidate(), float_const(ops, 0.0))
        paid = ops("Where", judged, paid, ops.const(np.float32(1e30), np.float32))
        shape, window = ops.concat(ops.dim(paid, 0), ops.dim(paid, 1), ops.dim(paid, 3)), ops.dim(paid, 3)
        flat = ops("Reshape", paid, ops.concat(ops.const([-1]), window))
        order = select.top(ops, flat, window, budget.longest, largest=False)
        ascending = ops("Reshape", ops("GatherElements", flat, order, axis=1), shape)
        given_up = ops("LessOrEqual", ops("CumSum", ascending, ops.const(2)), ops("Unsqueeze", spare, ops.const([2])))
        gone = ops("ReduceSum", ops("Cast", given_up, to=ir.DataType.INT64), ops.const([2]), keepdims=0)
        return ops("Sub", budget.candidates, gone)

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, 1, W]."""
        return budget.both()[1]


POLICY = ZipVLDrop
