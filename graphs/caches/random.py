"""A random choice, another in every layer and key head: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring, flag
from vlmtrim.graphs.later import ir

APART = 101  # numbers between the draws of two sets


@dataclass(frozen=True)
class Random(Policy):
    """Every key head keeps visual tokens at random, the same ones every time.

    Number i + 101 s of ``numpy.random.default_rng(seed).random(dtype=float32)`` is the score of slot i in set s, where
    set s of a decoder of KV key heads is key head s % KV of layer s // KV.
    """

    seed: int = flag(0, "of the draw (0)")

    name: ClassVar[str] = "random"
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")

    @property
    def count(self) -> int:
        """No rows."""
        return 0

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, KV, W], zeros."""
        return scoring.by_head(scoring.received(scoring.probabilities))

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, 1, KV, W]."""
        ops, layers = budget.ops, int((budget.scores.shape or ())[0])  # type: ignore[arg-type]
        sets = layers * budget.sets
        table = np.random.default_rng(self.seed).random(budget.longest + APART * sets, dtype=np.float32)
        begin = ops.const(APART * np.arange(sets).reshape(layers, 1, budget.sets, 1))
        slot = ops("Range", ops.const(0), ops("Squeeze", ops.dim(budget.kinds, 2), ops.const([0])), ops.const(1))
        drawn = ops("Gather", ops.const(table, np.float32), ops("Add", begin, slot), axis=0)
        return ops("Expand", drawn, ops("Shape", budget.scores))


POLICY = Random
