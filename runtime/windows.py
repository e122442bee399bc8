"""Caches of layers that see a window alone: the window moves to the front where a step would not fit behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlmtrim.graphs.contract import Contract, cache_names
from vlmtrim.runtime.backends.base import Chain, Graph, Tensor


class Windows:
    """Moves windows, by the bundle's ``shift`` graphs (:mod:`vlmtrim.graphs.contract`)."""

    def __init__(self, contract: Contract, caches: Mapping[str, Tensor]):
        self._groups = [(index, group) for index, group in enumerate(contract.groups) if group.window]
        self._caches = caches

    def make_room(
        self, graph: Callable[[str], Graph | Chain], entries: Sequence[np.ndarray], grown: Sequence[int]
    ) -> None:
        """Let every row of the groups that the next step does not fit into hold its window alone.

        Args:
            graph: opens a graph of the bundle by its name.
            entries: of every group what its caches hold, int64 [B] each; changed in place.
            grown: of every group the entries that the step writes.
        """
        for index, group in self._groups:
            filled = entries[index]
            if int(filled.max()) + grown[index] <= group.capacity:
                continue
            first = np.maximum(filled - group.window, 0)
            shift = graph(group.shift)
            for layer in group.layers:
                names = zip(cache_names(layer), ("key", "value"), strict=True)
                shift.bind_caches({f"past_key_values.{kind}": self._caches[past] for (past, _), kind in names})
                shift.run({"first_kept": first})
            filled -= first
