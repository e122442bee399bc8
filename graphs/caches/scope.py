"""SCOPE (arXiv 2412.13649, ACL 2025): a long answer keeps its last words and those that the current one attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Budgeting, Policy, flag, float_const
from vlmtrim.graphs.keeping import SAID
from vlmtrim.graphs.later import ir


@dataclass(frozen=True)
class Scope(Policy):
    """While an answer grows every layer keeps ``window`` of its words; the prompt, pictures included, stays whole.

    Every ``every`` steps, of what was said since the question: the last ``recent`` words, and of the others those to
    which the current one attends most (mean over heads), up to ``window`` together. ``--cache-share`` changes nothing.
    The published code keeps its state in the class, so that two conversations disturb each other; here it is the row's.

    Attributes:
        window: words of the answer that stay.
        recent: of them the last ones.
        every: decode steps between two rounds.
    """

    window: int = flag(1024, "words of the answer that stay (1024)")
    recent: int = flag(256, "of them the last ones, whatever they score (256)")
    every: int = flag(16, "decode steps between two rounds (16); run-vlm --cache-every says another")

    name: ClassVar[str] = "scope"
    candidates: ClassVar[str] = SAID

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.recent <= self.window:
            raise ValueError(
                f"window is {self.window}, recent {self.recent}, every {self.every}: give 1 or more each, recent up to "
                "window"
            )

    @property
    def interval(self) -> int:
        """Decode steps between two rounds."""
        return self.every

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]."""
        return budget.ops("Min", budget.judged, budget.ops.const(self.window))

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, 1, W]; attention is at most 1."""
        ops = budget.ops
        recent = ops("Cast", budget.newest(ops.const(self.recent)), to=ir.DataType.FLOAT)
        return ops("Add", budget.scores, ops("Mul", recent, float_const(ops, 2.0)))


POLICY = Scope
