"""A Stitch in Time, SGL (arXiv 2412.03324, CVPR 2025): drop visual tokens by scores that come from outside."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from vlmtrim.graphs.contract import BUNDLE, TOKENS, CacheGroup
from vlmtrim.graphs.later import ir
from vlmtrim.graphs.methods import flag
from vlmtrim.graphs.methods.fastv import FastV
from vlmtrim.graphs.rules import Step


@dataclass(frozen=True)
class Guided:
    """FastV's selection with a ranking that the decoder is given: attention of a smaller model to the same tokens.

    The decoder takes ``guide_scores`` float32 [B, N]; everything else is as in :class:`FastV`: the
    ``round(N * (1 - r))`` visual tokens of highest score stay from layer ``k`` on, ties: lowest index first, survivors
    keep their order and their original position ids.

    Attributes:
        k: number of decoder layers that run on all tokens, 0 <= k < number of layers.
        r: share of visual tokens that is removed, 0 <= r < 1.
    """

    k: int = flag(2, "decoder layers that run on all tokens (default 2)")
    r: float = flag(0.75, "share of visual tokens REMOVED, 0 <= r < 1 (0.75)")

    name: ClassVar[str] = "guided"
    prunes: ClassVar[str] = TOKENS
    guide: ClassVar[str] = BUNDLE

    def __post_init__(self) -> None:
        self._placed()

    def _placed(self) -> FastV:
        """The selection at its place; of its own rules it needs none. Raises ValueError for flags out of range."""
        return FastV(self.k, self.r, score="stride")

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        return f"guided-k{self.k}-r{self.r:g}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self)}

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """The cache groups of the pruned model, FastV's."""
        return self._placed().groups(dense, visual_tokens)

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Insert the selection into a decoder graph, in place, and return it; arguments as FastV's."""
        return self._placed().insert(model, visual_tokens, grid, _given, guided=True)


def _given(step: Step) -> ir.Value:
    return step.ops("Identity", step.guide)


METHOD = Guided
