"""Greedy MAP of a determinantal point process over embeddings: picks that span the most volume; text is not looked at.

CDPruner (arXiv 2506.10967) without its relevance; the updates of arXiv 1709.05135: the gain of a token is the square of
its distance from the span of the picked ones. The earlier a pick, the higher its score. Gains are compared in steps of
a percent, down to LEAST, so that of equal tokens every library picks the first.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import greedy, ir, states
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step

NEEDS: frozenset[str] = frozenset()
COST = "1 % of a prefill at 576 visual tokens, 9 % at 2,880"
LEAST = 1e-3  # of a gain: below, the picked tokens all but span a token, and rounding would decide
STEPS = 64.0  # to a factor of e


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    features, number, none = states.with_none(step)
    return picks(step, states.cosines(step.ops, features, features), number, none)


def picks(step: Step, kernel: ir.Value, number: ir.Value, none: ir.Value) -> ir.Value:
    """The order of the greedy picks as scores [B, N]; ``kernel`` [B, N + 1, N + 1], diagonal at most 1, and its tokens'
    numbers and what is none of them (:func:`vlmtrim.graphs.surgery.states.with_none`)."""
    ops, one = step.ops, step.ops.const([1])
    kept = step.sizes.kept_visual
    itself = ops("Cast", ops("Equal", number, ops("Unsqueeze", number, one)), to=ir.DataType.FLOAT)
    gain = ops("ReduceSum", ops("Mul", kernel, itself), one, keepdims=1)
    gain = ops("Sub", gain, ops("Mul", none, ops.const(greedy.SPENT, np.float32)))
    scores = ops("Mul", gain, ops.const(0.0, np.float32))
    place = ops("Range", ops.const(0), ops("Squeeze", kept, ops.const([0])), ops.const(1))
    shape = ops.concat(step.sizes.batch, kept, ops("Add", step.sizes.visual, one))
    rows = ops("Expand", ops.const(0.0, np.float32), shape)  # of the Cholesky factor: one a pick
    column = ops("Unsqueeze", place, one)

    def body(inner: Ops, turn: ir.Value, entering: list[ir.Value]) -> list[ir.Value]:
        gain, scores, rows = entering
        size = inner("Log", inner("Max", gain, inner.const(LEAST, np.float32)))
        steps = inner("Round", inner("Mul", size, inner.const(STEPS, np.float32)))
        left = inner("Sub", steps, inner("Mul", greedy.picked(inner, gain), inner.const(1e6, np.float32)))
        chosen = greedy.best(inner, left, number)
        its = inner("ReduceSum", inner("Mul", gain, chosen), inner.const([2]), keepdims=1)
        its = inner("Max", its, inner.const(LEAST, np.float32))
        part = inner("MatMul", rows, inner("Transpose", chosen, perm=[0, 2, 1]))  # [B, M, 1]
        known = inner("MatMul", inner("Transpose", part, perm=[0, 2, 1]), rows)
        row = inner("Div", inner("Sub", inner("MatMul", chosen, kernel), known), inner("Sqrt", its))
        gain = inner("Sub", gain, inner("Mul", row, row))
        gain = inner("Sub", gain, inner("Mul", chosen, inner.const(greedy.SPENT, np.float32)))
        here = inner("Cast", inner("Equal", column, turn), to=ir.DataType.FLOAT)  # [M, 1]
        return [gain, inner("Add", scores, greedy.picked(inner, gain)), inner("Add", rows, inner("Mul", here, row))]

    return states.without_none(step, greedy.repeat(ops, kept, [gain, scores, rows], body)[1])
