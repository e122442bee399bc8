"""What a decoder computes, in multiply-adds. Standard library only; part of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from vlmtrim.graphs.schema import Range

Macs64 = Annotated[int, Range(0, 2**63 - 1)]


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of a decoder whose layers are all alike, for predictions and reports; nothing that runs needs them.

    The last layer runs on one token a row, but for the keys and values that later tokens attend to.

    Attributes:
        token: of one layer's matrices, per token; one for each of their weights.
        pair: of one layer's attention, per query and key.
        logits: of the logits of one token.
        written: the part of ``token`` that keys and values take, in cross-attention layers per image feature.
    """

    token: Macs64
    pair: Macs64
    logits: Macs64
    written: Macs64 = 0

    def prefill(self, layers: Iterable[tuple[int, int]]) -> int:
        """Of layers that run on all their tokens in a prefill from empty caches, and the logits of one token; as it is
        executed, with the whole S x S attention.

        Args:
            layers: (number of layers, tokens that they run on).
        """
        return self.logits + sum(n * (self.token * tokens + self.pair * tokens * tokens) for n, tokens in layers)

    def spared(self, tokens: int, keys: int) -> int:
        """What the last layer leaves out of ``tokens`` that attend to ``keys`` each."""
        return (tokens - 1) * (self.token - self.written + self.pair * keys)

    def choosing(self, tokens: int, kept: int, width: int) -> int:
        """Of a layer that computes queries, values and output for the tokens that it keeps, the rest for all of them;
        without what it scores them by."""
        shared = self.token - self.written // 2 - self.pair * width  # keys and MLP; queries and output: pair x width
        return shared * tokens + (self.token - shared) * kept + self.pair * kept * kept

    def choosing_last(self, tokens: int, kept: int) -> int:
        """The same of the last layer: keys of all tokens, values of those that it keeps, one row of all else."""
        return self.written // 2 * (tokens + kept) + self.token - self.written + self.pair * kept

    def crossing(self, tokens: int, features: int) -> int:
        """Of one cross-attention layer in a prefill: every token attends to every feature of the step."""
        return (self.token - self.written) * tokens + (self.written + self.pair * tokens) * features
