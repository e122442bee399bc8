"""Keyformer (arXiv 2403.09054, MLSys 2024): caches of one size, by attention with noise; the newest words stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, flag
from vlmtrim.graphs.keeping import ALL, PROBE
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class Keyformer(Policy):
    """Every key head keeps a share of the prompt, TEXT INCLUDED, and as many entries while the answer grows.

    Score: softmax of (logits + Gumbel noise) / temperature, summed over ``probe`` rows of the prompt (the paper: all of
    them) and over every decode step, mean over the query heads of a key head; the temperature grows by ``rise`` a step.
    The newest ``recent`` of what may stay are kept whatever they score. The noise makes the method random: it is drawn
    from ``seed``, one draw a step for all rows, layers and heads, so that an answer can be had again. Published code
    masks what it gives up and frees nothing.

    Attributes:
        probe: rows of the prompt.
        recent: share of what stays that is the newest.
        every: decode steps between two rounds.
        temperature, rise: of the noise at the prompt, and what every step adds.
        seed: of the noise.
    """

    probe: int = flag(32, "rows of the prompt, at a uniform stride, whose attention counts (32)")
    recent: float = flag(0.3, "share of what stays that is the newest, whatever it scores (0.3)")
    every: int = flag(16, "decode steps between two rounds (16); run-vlm --cache-every says another")
    temperature: float = flag(1.0, "of the noisy softmax at the prompt (1)")
    rise: float = flag(0.0, "what every decode step adds to the temperature (0; the paper: 1 over the answer's length)")
    seed: int = flag(0, "of the noise (0)")

    name: ClassVar[str] = "keyformer"
    rows: ClassVar[str] = PROBE
    by_head: ClassVar[bool] = True
    candidates: ClassVar[str] = ALL
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.probe < 1 or self.every < 1 or self.seed < 0:
            raise ValueError(f"probe is {self.probe}, every {self.every}, seed {self.seed}: give 1, 1 and 0 or more")
        if not 0 <= self.recent <= 1 or self.temperature <= 0 or self.rise < 0:
            raise ValueError(f"recent is {self.recent}, temperature {self.temperature}, rise {self.rise}: out of range")

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.probe

    @property
    def interval(self) -> int:
        """Decode steps between two rounds."""
        return self.every

    @property
    def noise(self) -> int:
        """Seed of the noise."""
        return self.seed

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the noise, at the first step, and what every later one adds."""
        return self.temperature, self.rise

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, KV, W]."""
        ops = budget.ops
        share = ops("Mul", ops("Cast", counts, to=ir.DataType.FLOAT), ops.const(self.recent, np.float32))
        newest = budget.newest(ops("Unsqueeze", ops("Cast", ops("Round", share), to=ir.DataType.INT64), ops.const([2])))
        return ops("Where", newest, ops.const(1e30, np.float32), budget.scores)


POLICY = Keyformer
