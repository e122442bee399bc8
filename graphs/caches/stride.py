"""Visual tokens at a uniform stride: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Budgeting, Policy
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class Stride(Policy):
    """Every layer keeps the same visual tokens, spread evenly: number j of n where (j k) % n < k, k of which stay."""

    name: ClassVar[str] = "stride"

    @property
    def count(self) -> int:
        """No rows."""
        return 0

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, 1, W], 1 for what stays."""
        ops = budget.ops
        judged = ops("Cast", ops("Equal", budget.kinds, ops.const(1)), to=ir.DataType.INT64)
        number = ops("Sub", ops("CumSum", judged, ops.const(2)), ops.const(1))  # [L, B, W]
        kept = ops("Unsqueeze", counts, ops.const([2]))
        total = ops("Max", ops("Unsqueeze", budget.candidates, ops.const([2])), ops.const(1))
        product = ops("Max", ops("Mul", number, kept), ops.const(0))
        rest = ops("Sub", product, ops("Mul", ops("Div", product, total), total))
        return ops("Unsqueeze", ops("Cast", ops("Less", rest, kept), to=ir.DataType.FLOAT), ops.const([2]))


POLICY = Stride
