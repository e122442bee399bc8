"""KeyDiff (arXiv 2504.15364): the keys that are least like all others, whatever is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Policy, Scoring, float_const
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Every key head keeps the visual tokens whose keys differ most from the mean direction of all visual keys.

    Score: minus the cosine between a key and the mean of the normalised keys. No row of the prompt is looked at, so the
    choice is as good for a follow-up question as for the first.
    """

    name: ClassVar[str] = "keydiff"
    by_head: ClassVar[bool] = True

    @property
    def count(self) -> int:
        """No rows."""
        return 0

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, KV, W]."""
        ops = scoring.ops
        keys = ops("Cast", scoring.keys, to=ir.DataType.FLOAT)
        keys = ops("Div", keys, ops("Max", ops("ReduceL2", keys, ops.const([3]), keepdims=1), float_const(ops, 1e-30)))
        judged = ops("Cast", ops("Equal", scoring.kinds, ops.const(1)), to=ir.DataType.FLOAT)
        anchor = ops(
            "ReduceSum", ops("Mul", keys, ops("Unsqueeze", judged, ops.const([1, 3]))), ops.const([2]), keepdims=1
        )
        length = ops("Max", ops("ReduceL2", anchor, ops.const([3]), keepdims=1), float_const(ops, 1e-30))
        alike = ops("ReduceSum", ops("Mul", keys, ops("Div", anchor, length)), ops.const([3]), keepdims=0)
        return ops("Neg", alike)


POLICY = KeyDiff
