"""Layers that choose by themselves which of a step's visual tokens they keep: what their caches took."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.backends.base import Backend, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal


class Choosing:
    """Reads a step's choices out of the decoder's outputs. Knows the contract, no method."""

    def __init__(self, contract: Contract, backend: Backend):
        self._groups, self._backend = contract.groups, backend
        self._choosing = [index for index, group in enumerate(contract.groups) if group.chooses]

    def __bool__(self) -> bool:
        return bool(self._choosing)

    def added(self, outputs: Mapping[str, Tensor], counts: np.ndarray, visual: int) -> dict[int, np.ndarray]:
        """Group -> entries that each row's caches took, int64 [B].

        Args:
            counts: int64 [B], real tokens of each row; 0 for a row that runs along.
            visual: visual tokens of each row among them.

        Raises:
            RuntimeRefusal: a layer says that it took more than its contract promises.
        """
        taken = {}
        for index in self._choosing:
            kept = np.zeros(len(counts), dtype=np.int64)
            if visual:
                kept = self._backend.to_host(outputs[f"kept_counts.{index}"])
                self._check(index, kept, counts, visual)
            taken[index] = np.where(counts > 0, counts - visual + kept, 0)
        return taken

    def kept(self, outputs: Mapping[str, Tensor], counts: np.ndarray, visual: int) -> list[list[np.ndarray]] | None:
        """Per layer and row the new tokens that its caches took, ascending; None where no layer chooses."""
        if not self._choosing:
            return None
        taken, by_layer = self.added(outputs, counts, visual), {}
        for index, group in enumerate(self._groups):
            rows = [np.arange(count) for count in counts]
            if group.chooses and visual:
                order = self._backend.to_host(outputs[f"kept_indices.{index}"])
                rows = [row[:count] for row, count in zip(order, taken[index], strict=True)]
            by_layer |= dict.fromkeys(group.layers, rows)
        return [by_layer[layer] for layer in sorted(by_layer)]

    def _check(self, index: int, kept: np.ndarray, counts: np.ndarray, visual: int) -> None:
        most = self._groups[index].length(visual, visual)
        if kept.shape != counts.shape or kept.min() < 0 or kept.max() > most:
            raise RuntimeRefusal(
                f"layer {self._groups[index].layers[0]} kept {kept.tolist()} of {visual} visual tokens, its contract "
                f"promises at most {most}; export the model again"
            )
