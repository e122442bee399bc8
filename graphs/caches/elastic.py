"""Elastic Cache (arXiv 2407.18121, ECCV 2024): what gathered most attention; what goes may be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmtrim.graphs.caches import Policy, flag
from vlmtrim.graphs.keeping import PROBE


@dataclass(frozen=True)
class Elastic(Policy):
    """Every layer keeps the visual tokens that a probe of the prompt's rows attends to most.

    Score: sum over ``probe`` rows at a uniform stride, the last one among them, mean over heads. The published code
    ranks by a single argsort, which picks other tokens than those of highest score; here they are those of highest.

    Attributes:
        probe: rows in place of all rows.
        evict: the papers' eviction while an answer grows: every word takes the place of the entry so many before the
            end, so that the caches hold as many as after the question. 0: none. It gives up the question's own words
            and all but the last of the answer's, whatever they score.
        merge: average what goes into its nearest entry that stays, as the paper does. It averages rotated keys, and
            loses much on the demo's questions.
    """

    probe: int = flag(32, "rows of the prompt, at a uniform stride, whose attention counts (32)")
    merge: bool = flag(False, "average what goes into its nearest entry that stays (the paper's way, and worse here)")
    evict: int = flag(0, "entries at the end in which an answer goes round, the papers' 25 (0: caches grow with it)")

    name: ClassVar[str] = "elastic"
    rows: ClassVar[str] = PROBE

    def __post_init__(self) -> None:
        if self.probe < 1 or self.evict < 0:
            raise ValueError(f"probe is {self.probe}, evict {self.evict}: give 1 or more, and 0 or more")

    @property
    def ring(self) -> int:
        """Entries at the end of a question in which the answer goes round; 0 where it grows."""
        return self.evict

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.probe

    @property
    def merges(self) -> bool:
        """Whether what goes is averaged into what stays."""
        return self.merge


POLICY = Elastic
