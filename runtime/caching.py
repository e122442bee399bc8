"""What stays in the caches: runs a bundle's cache policy behind a step that brought visual tokens.

Knows the contract (:mod:`vlmtrim.graphs.keeping`), no policy. What is judged are the visual tokens of that step; what
earlier steps left, and all text, stays. Positions stay what they were; only the caches hold fewer entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.contract import Contract, cache_names
from vlmtrim.graphs.keeping import CANDIDATE, LAST, NO_ENTRY, POLICY, PROBE, SCORE, STAYS, VISUAL
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal


@dataclass(frozen=True)
class Round:
    """What one round left.

    Attributes:
        entries: of every group and row, how many entries its caches hold now, int64 [B] each.
        held: of every layer and row the step's tokens that stay, int64 [X, n].
    """

    entries: list[np.ndarray]
    held: list[list[np.ndarray]]


class Caching:
    """Feeds the rows whose queries score the caches, and lets the policy's graphs cut them."""

    def __init__(self, contract: Contract, backend: Backend, caches: Mapping[str, Tensor]):
        self._contract, self._backend, self._caches = contract, backend, caches
        self._record = contract.cache
        self._share = 1.0 if self._record is None else self._record.share
        # What the last round judged by, of all layers: scores float32 [L, B, Z, W] and kinds int64 [L, B, W].
        self.judged: tuple[np.ndarray, np.ndarray] | None = None

    def __bool__(self) -> bool:
        return self._record is not None

    @property
    def share(self) -> float:
        """Share of the candidates that stays. Setting it raises RuntimeRefusal where the bundle has no policy."""
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        if self._record is None:
            raise RuntimeRefusal("the bundle has no cache policy; leave the share out, or export with --cache POLICY")
        if not 0 <= share <= 1:
            raise RuntimeRefusal(f"the share of the caches is {share:g}; give 0 to 1")
        self._share = share

    def _rows(self, counts: np.ndarray, visual_positions: np.ndarray) -> np.ndarray:
        """Tokens of the step that score, int64 [B, R], ascending, filled up with -1 in front; R = 0 for none.

        Args:
            counts: int64 [B], real tokens of each row.
            visual_positions: int64 [B, N].
        """
        record = self._record
        if record is None or not visual_positions.shape[1] or record.candidates != VISUAL:
            return np.zeros((len(counts), 0), dtype=np.int64)
        chosen = []
        for count, visual in zip(counts.tolist(), visual_positions, strict=True):
            if record.rows == PROBE:
                number = min(record.count, count)
                chosen.append([(i + 1) * count // number - 1 for i in range(number)])
                continue
            first = 0 if record.rows == LAST else min(int(visual[-1]) + 1, count - 1)
            number = min(record.count, count - first, max(1, int(record.part * count)))
            chosen.append(list(range(count - number, count)) if record.count else [])
        width = max(map(len, chosen))
        return np.array([[-1] * (width - len(row)) + row for row in chosen], dtype=np.int64)

    def feeds(self, counts: np.ndarray, visual_positions: np.ndarray) -> dict[str, Tensor]:
        """Inputs of the decoder for a step; arguments as :meth:`after`'s."""
        return {} if self._record is None else {"score_rows": np.maximum(self._rows(counts, visual_positions), 0)}

    def taken(
        self, counts: np.ndarray, kept: list[np.ndarray] | None, by_layer: list[list[np.ndarray]] | None
    ) -> list[list[np.ndarray]]:
        """Of every group and row the step's tokens that its caches took, ascending.

        Args:
            counts: int64 [B], real tokens of each row.
            kept: of every row the tokens that survive a selection; None where there is none.
            by_layer: of every layer and row the tokens that it keeps; None where no layer chooses.
        """
        every = [np.arange(count) for count in counts]
        if by_layer is not None:
            return [by_layer[group.layers[0]] for group in self._contract.groups]
        return [every if kept is None or not group.removed else kept for group in self._contract.groups]

    def after(
        self,
        graph: Callable[[str], Graph | Chain],
        queries: Mapping[str, Tensor],
        counts: np.ndarray,
        visual_positions: np.ndarray,
        taken: Sequence[Sequence[np.ndarray]],
        before: Sequence[np.ndarray],
    ) -> Round:
        """Cut the caches behind a step.

        Args:
            graph: opens a graph of the bundle by its name.
            queries: what the decoder returned.
            counts: int64 [B], real tokens of each row.
            visual_positions: int64 [B, N].
            taken: of :meth:`taken`.
            before: of every group the entries before the step, int64 [B] each.

        Raises:
            RuntimeRefusal: the policy names entries that are not there.
        """
        rows = self._rows(counts, visual_positions)
        entries = [old + [len(row) for row in new] for old, new in zip(before, taken, strict=True)]
        window = self._window(entries)
        kinds = np.stack([self._kinds(*of, visual_positions, window) for of in zip(taken, before, strict=True)])
        slots = [self._slots(rows, *of) for of in zip(taken, before, strict=True)]
        of_layer = self._groups()
        scores = [
            self._score(graph(SCORE), queries[f"score_queries.{layer}"], slots[group], kinds[group], layer, window)
            for layer, group in enumerate(of_layer)
        ]
        self.judged = np.stack(scores), kinds[of_layer]
        order, stay = self._cut(graph, *self.judged, entries)
        held = [
            [
                new[one[:, first:count] - first]  # what was there before the step stays, in front
                for one, new, first, count in zip(order[layer], taken[group], before[group], stay[layer], strict=True)
            ]
            for layer, group in enumerate(of_layer)
        ]
        return Round([stay[group.layers[0]] for group in self._contract.groups], held)

    def _groups(self) -> list[int]:
        """Group of every layer."""
        groups = {layer: index for index, group in enumerate(self._contract.groups) for layer in group.layers}
        return [groups[layer] for layer in range(len(groups))]

    def _window(self, entries: Sequence[np.ndarray]) -> int:
        most = max(group.capacity for group in self._contract.groups)
        return self._backend.window(max(1, max(int(each.max()) for each in entries)), most)

    @staticmethod
    def _kinds(
        taken: Sequence[np.ndarray], before: np.ndarray, visual_positions: np.ndarray, window: int
    ) -> np.ndarray:
        """Kinds of a group's entries, int64 [B, W]."""
        kinds = np.full((len(before), window), NO_ENTRY, dtype=np.int64)
        for row, (tokens, start) in enumerate(zip(taken, before.tolist(), strict=True)):
            kinds[row, :start] = STAYS
            is_visual = np.isin(tokens, visual_positions[row])
            kinds[row, start : start + len(tokens)] = np.where(is_visual, CANDIDATE, STAYS)
        return kinds

    @staticmethod
    def _slots(rows: np.ndarray, taken: Sequence[np.ndarray], before: np.ndarray) -> np.ndarray:
        """Where the tokens at ``rows`` are in a group's caches, int64 [B, R]; -1 for one that they did not take."""
        slots = np.full(rows.shape, -1, dtype=np.int64)
        for row, (tokens, start) in enumerate(zip(taken, before.tolist(), strict=True)):
            place = np.searchsorted(tokens, rows[row])
            there = (place < len(tokens)) & (tokens[np.minimum(place, len(tokens) - 1)] == rows[row])
            slots[row] = np.where(there, start + place, -1)
        return slots

    def _score(
        self, graph: Graph | Chain, queries: Tensor, slots: np.ndarray, kinds: np.ndarray, layer: int, window: int
    ) -> np.ndarray:
        """Scores of a layer's entries, float32 [B, Z, W]."""
        key, _ = cache_names(layer)
        cache = self._caches[key[0]]
        own = min(window, next(g.capacity for g in self._contract.groups if layer in g.layers))
        feeds = {"score_queries": queries, "row_slots": slots, "key_kinds": np.ascontiguousarray(kinds[:, :own])}
        scores = self._backend.to_host(graph.run({**feeds, "past_key_values.key": cache})["key_scores"])
        return np.pad(scores, ((0, 0), (0, 0), (0, window - own)))

    def _cut(
        self,
        graph: Callable[[str], Graph | Chain],
        scores: np.ndarray,
        kinds: np.ndarray,
        entries: Sequence[np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Let the policy choose by scores [L, B, Z, W] and kinds [L, B, W], and compact every layer; returns its
        order [L, B, X, W] and counts [L, B]."""
        record, of_layer = self._record, self._groups()
        assert record is not None
        given = {"key_scores": scores, "key_kinds": kinds, "share": np.array(self._share, dtype=np.float32)}
        chosen = graph(POLICY).run(given)
        order, counts = (self._backend.to_host(chosen[name]) for name in ("order", "counts"))
        self._check(order, counts, np.stack([entries[group] for group in of_layer]))
        for layer, group in enumerate(of_layer):
            if (counts[layer] < entries[group]).any():
                name = record.compacts[group]
                feeds = self._feeds(name, order[layer], counts[layer], kinds[layer])
                self._compact(graph(name), layer, feeds)
        return order, counts

    def _feeds(self, name: str, order: np.ndarray, counts: np.ndarray, kinds: np.ndarray) -> dict[str, Tensor]:
        """What compacts a layer of order [B, X, W], counts [B] and kinds [B, W], besides its caches."""
        inputs = {tensor.name: tensor for tensor in self._contract.graphs[name].inputs}
        capacity = inputs["past_key_values.key"].shape[2]
        assert isinstance(capacity, int)
        first = np.minimum(order[:, :, : max(1, int(counts.max()))], capacity - 1)
        feeds = {"order": first, "counts": counts, "key_kinds": kinds[:, :capacity]}
        return {name: np.ascontiguousarray(value) for name, value in feeds.items() if name in inputs}

    def _compact(self, graph: Graph | Chain, layer: int, feeds: dict[str, Tensor]) -> None:
        names = zip(cache_names(layer), ("key", "value"), strict=True)
        graph.bind_caches({f"past_key_values.{kind}": self._caches[past] for (past, _), kind in names})
        graph.run(feeds)

    def _check(self, order: np.ndarray, counts: np.ndarray, entries: np.ndarray) -> None:
        """Refuse a policy that keeps what is not there: the caches' lengths would lie."""
        if counts.shape != entries.shape or (counts < 0).any() or (counts > entries).any():
            raise RuntimeRefusal(
                f"the cache policy keeps {counts.max(initial=0)} entries of {entries.max(initial=0)}; export the model "
                "again"
            )
        named = np.arange(order.shape[3]) < counts[:, :, None, None]
        if (named & ((order < 0) | (order >= entries[:, :, None, None]))).any():
            raise RuntimeRefusal("the cache policy names entries that the caches do not hold; export the model again")
