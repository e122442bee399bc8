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
STEPS = 1024.0


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops, one = step.ops, step.ops.const([1])
    features, number = states.unit_visual(step), states.numbers(step)
    cosines = states.cosines(ops, features, features)
    itself = ops("Equal", number, ops("Unsqueeze", number, one))
    others = ops("Where", itself, ops.const(-2.0, np.float32), cosines)
    nearest = ops("Sub", ops.const(1.0, np.float32), ops("ReduceMax", others, one, keepdims=1))

    def take(ops: Ops, values: ir.Value, count: ir.Value, gap: ir.Value | None = None) -> ir.Value:
        """Distances [B, 1, N] to the nearest picked token after one more pick; of picked tokens far below all."""
        steps = ops("Round", ops("Mul", values, ops.const(STEPS, np.float32)))
        chosen = greedy.best(ops, steps, number, count)
        distance = ops("Sub", ops.const(1.0, np.float32), ops("MatMul", chosen, cosines))
        distance = ops("Sub", distance, ops("Mul", chosen, ops.const(greedy.SPENT, np.float32)))
        return distance if gap is None else ops("Min", gap, distance)

    def body(inner: Ops, _: ir.Value, entering: list[ir.Value]) -> list[ir.Value]:
        gap, scores = entering
        gap = take(inner, gap, inner.const([1]), gap)
        return [gap, inner("Add", scores, greedy.picked(inner, gap))]

    gap = take(ops, nearest, ops("Min", step.sizes.visual, one))
    more = ops("Max", ops("Sub", step.sizes.kept_visual, one), ops.const([0]))
    scores = greedy.repeat(ops, more, [gap, greedy.picked(ops, gap)], body)[1]
    return ops("Squeeze", scores, one)
