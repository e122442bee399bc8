"""Max-min diversity of embeddings: each pick is the token farthest from all picked ones; text is not looked at.

DivPrune (arXiv 2503.02175): distance 1 - cosine of what the projector returns; the first pick is the token whose
nearest neighbour is farthest. The earlier a pick, the higher its score. Distances are compared in steps of 1 / 1024, so
that of equal tokens, such as the ends of lines, every library picks the first.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import greedy, ir, states
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step

NEEDS: frozenset[str] = frozenset()
COST = "0.5 % of a prefill at 576 visual tokens, 3 % at 2,880"
STEPS = 1024.0


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops, one = step.ops, step.ops.const([1])
    features, number, none = states.with_none(step)
    cosines = states.cosines(ops, features, features)
    itself = ops("Equal", number, ops("Unsqueeze", number, one))
    ignored = ops("Or", itself, ops("Greater", none, ops.const(0.5, np.float32)))
    others = ops("Where", ignored, ops.const(-2.0, np.float32), cosines)
    nearest = ops("Sub", ops.const(1.0, np.float32), ops("ReduceMax", others, ops.const([2]), keepdims=0))
    spent = ops.const(greedy.SPENT, np.float32)
    nearest = ops("Sub", ops("Unsqueeze", nearest, one), ops("Mul", none, spent))

    def distances(ops: Ops, values: ir.Value) -> ir.Value:
        """[B, 1, N + 1] from the token of the largest of ``values``; its own is far below all."""
        chosen = greedy.best(ops, ops("Round", ops("Mul", values, ops.const(STEPS, np.float32))), number)
        distance = ops("Sub", ops.const(1.0, np.float32), ops("MatMul", chosen, cosines))
        return ops("Sub", distance, ops("Mul", chosen, ops.const(greedy.SPENT, np.float32)))

    def body(inner: Ops, _: ir.Value, entering: list[ir.Value]) -> list[ir.Value]:
        gap, scores = entering
        gap = inner("Min", gap, distances(inner, gap))
        return [gap, inner("Add", scores, greedy.picked(inner, gap))]

    gap = ops("Sub", distances(ops, nearest), ops("Mul", none, spent))
    more = ops("Max", ops("Sub", step.sizes.kept_visual, one), ops.const([0]))
    return states.without_none(step, greedy.repeat(ops, more, [gap, greedy.picked(ops, gap)], body)[1])
