"""Rows of a session as slots: each is filled, emptied and moved by itself, and the first so many decode together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlmtrim.graphs.contract import cache_names
from vlmtrim.runtime.backends.base import Chain, Graph, Tensor
from vlmtrim.runtime.caching import Caching
from vlmtrim.runtime.session import Session


class Rows:
    """Every row of a session as a session of one row, and the first ``n`` rows together.

    Raises RuntimeRefusal where the backend cannot bind a row by itself.
    """

    def __init__(self, session: Session):
        self._session = session
        self.single = [session.part(row, 1) for row in range(session.batch)]
        self._first: dict[int, Session] = {}

    def first(self, count: int) -> Session:
        """Rows 0 to ``count``, for decode steps; a prefill is a single row's."""
        if count not in self._first:
            part = self._first[count] = self._session.part(0, count)
            part.caching = Apart(part, [single.caching for single in self.single[:count]])
        return self._first[count]

    def move(self, source: int, target: int) -> None:
        """Let a free row go on with another's conversation; the other one is free then."""
        old, new, session = self.single[source], self.single[target], self._session
        new.take_over(old)
        for group, entries in zip(session.contract.groups, new.lengths.entries, strict=True):
            for layer in group.layers:
                for past, _ in cache_names(layer):
                    session.backend.copy_entries(old.caches[past], new.caches[past], int(entries[0]))
        old.reset()

    def close(self) -> None:
        """Close the session."""
        self.single.clear()
        self._first.clear()
        self._session.close()


class Apart(Caching):
    """Decode steps of rows that asked at different times: each row's rounds are counted by its own :class:`Caching`,
    and judge its own caches, as they do where it is alone."""

    def __init__(self, session: Session, single: Sequence[Caching]):
        super().__init__(session.contract, session.backend, session.caches)
        self._single, self._live = single, np.zeros(len(single), dtype=bool)

    def decode_rows(self, live: np.ndarray) -> np.ndarray:
        """Of every row whose attention counts, its token; -1 for the others."""
        self._live = live
        own = [one.decode_rows(live[row : row + 1]) for row, one in enumerate(self._single)]
        width = max(rows.shape[1] for rows in own)
        return np.array([[-1] * (width - rows.shape[1]) + rows[0].tolist() for rows in own], dtype=np.int64)

    def places(self, entries: Sequence[np.ndarray], live: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Row by row."""
        own = [
            one.places([filled[row : row + 1] for filled in entries], None if live is None else live[row : row + 1])
            for row, one in enumerate(self._single)
        ]
        of_groups = [zip(*of_rows, strict=True) for of_rows in zip(*own, strict=True)]
        return [(np.concatenate(first), np.concatenate(last)) for first, last in of_groups]

    def grown(
        self,
        graph: Callable[[str], Graph | Chain],
        queries: Mapping[str, Tensor],
        rows: np.ndarray,
        before: Sequence[np.ndarray],
        entries: list[np.ndarray],
    ) -> list[np.ndarray]:
        """Row by row, where a round is due."""
        left = [filled.copy() for filled in entries]
        for row in np.flatnonzero(self._live).tolist():
            judged = rows[row : row + 1] if rows.shape[1] and rows[row, -1] >= 0 else np.zeros((1, 0), dtype=np.int64)
            asked = {}
            if judged.shape[1]:
                names = [name for name in queries if name.startswith("score_queries.")]
                asked = {name: self._backend.rows(queries[name], row, 1) for name in names}
            of_row = [[filled[row : row + 1] for filled in of] for of in (before, entries)]
            for filled, stay in zip(left, self._single[row].grown(graph, asked, judged, *of_row), strict=True):
                filled[row] = stay[0]
        return left
