"""Attention to the visual tokens of a conversation, summed while it runs: what a bundle tells the one that it guides.

The sum of A Stitch in Time, SGL (arXiv 2412.03324): over all layers and heads, the rows of the prompt behind its last
visual token, and every token that is generated after it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.backends.base import Backend, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal


class Attention:
    """Feeds the rows that are summed and adds up what they give, while it is ``on``; no rows are fed before.

    Knows the contract, no family. The sum begins anew with every step that brings visual tokens.
    """

    def __init__(self, contract: Contract, backend: Backend):
        self.emitted = any(tensor.name == "key_scores" for tensor in contract.graphs["decoder"].outputs)
        self._most, self._backend = contract.dims["R"][1] if self.emitted else 0, backend
        self._on = False
        self._entries: np.ndarray | None = None  # of the visual tokens in the caches, [B, N]
        self._sum: np.ndarray | None = None

    @property
    def on(self) -> bool:
        """Whether attention is summed. Setting it raises RuntimeRefusal where the bundle returns none."""
        return self._on

    @on.setter
    def on(self, on: bool) -> None:
        if on and not self.emitted:
            raise RuntimeRefusal("the bundle does not return its attention; export it with --method none --emit-guide")
        self._on = on
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._entries = self._sum = None

    @property
    def received(self) -> np.ndarray:
        """What each visual token of the last step that brought any has received since, float32 [B, N]."""
        if self._sum is None:
            raise RuntimeRefusal("no attention was summed: switch it on, and ask about a picture")
        return self._sum.astype(np.float32)

    def feeds(self, tokens: int, counts: np.ndarray, visual_positions: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs of the decoder for a step.

        Args:
            tokens: of the step, S.
            counts: int64 [B], real tokens of each row; 0 for a row that runs along.
            visual_positions: int64 [B, N].
        """
        if not self.emitted:
            return {}
        after = visual_positions[:, -1] + 1 if visual_positions.shape[1] else np.zeros(len(counts), dtype=np.int64)
        width = int((counts - after).max()) if self._watches(visual_positions) else 0
        width = max(0, min(width, self._most))
        rows = counts[:, None] - width + np.arange(width)
        real = (rows >= after[:, None]) & (rows >= 0)
        return {
            "score_rows": np.clip(rows, 0, tokens - 1),
            "score_weights": real.astype(np.float32),
        }

    def took(
        self, outputs: Mapping[str, Tensor], counts: np.ndarray, visual_positions: np.ndarray, entries: np.ndarray
    ) -> None:
        """Add what a step gave; ``entries`` int64 [B] are those of the caches before it."""
        if not self._watches(visual_positions):
            return
        if visual_positions.shape[1]:
            self._entries = entries[:, None] + visual_positions
            self._sum = np.zeros(self._entries.shape)
        assert self._entries is not None and self._sum is not None
        self._sum += np.take_along_axis(self._backend.to_host(outputs["key_scores"]), self._entries, axis=1)

    def _watches(self, visual_positions: np.ndarray) -> bool:
        return self._on and (visual_positions.shape[1] > 0 or self._entries is not None)
