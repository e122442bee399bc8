"""What stays in the caches: runs a bundle's cache policy behind a step that brought visual tokens.

Knows the contract (:mod:`vlmtrim.graphs.keeping`), no policy. What is judged are the visual tokens of that step; what
earlier steps left, and all text, stays. Positions stay what they were; only the caches hold fewer entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.contract import Contract, cache_names
from vlmtrim.graphs.keeping import ALL, CANDIDATE, FRESH, LAST, NO_ENTRY, POLICY, PROBE, SAID, SCORE, STAYS, VISUAL
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal


@dataclass(frozen=True)
class Round:
    """What one round left.

    Attributes:
        entries: of every group and row, how many entries its caches hold now, int64 [B] each.
        held: of every layer and row the step's tokens that stay, int64 [X, n]; None where nothing of it was judged.
    """

    entries: list[np.ndarray]
    held: list[list[np.ndarray]] | None


class Caching:
    """Feeds the rows whose queries score the caches, and lets the policy's graphs cut them."""

    def __init__(self, contract: Contract, backend: Backend, caches: Mapping[str, Tensor]):
        self._contract, self._backend, self._caches = contract, backend, caches
        self._record = contract.cache
        self._share = 1.0 if self._record is None else self._record.share
        self._every = 0 if self._record is None else self._record.every
        # What the last round judged by, of all layers: scores float32 [L, B, Z, W] and kinds int64 [L, B, W].
        self.judged: tuple[np.ndarray, np.ndarray] | None = None
        self.reset()

    def __bool__(self) -> bool:
        return self._record is not None

    def reset(self) -> None:
        """Begin a new conversation."""
        self._sums: np.ndarray | None = None  # of the scores of all steps, [L, B, Z, C]
        self._settled: list[np.ndarray] = []  # of every group, entries that were there after the last round
        self._steps = 0  # decode steps since the last question

    def take_over(self, other: Caching) -> None:
        """Go on with the conversation of another one of the same bundle, whose caches these are now."""
        self._sums, self._settled, self._steps = other._sums, other._settled, other._steps

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

    @property
    def every(self) -> int:
        """Decode steps between two rounds while an answer grows; 0: none. Setting it raises RuntimeRefusal for a policy
        that acts behind questions alone."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        if self._record is None or not self._record.every:
            raise RuntimeRefusal(
                "the bundle's caches are not cut while an answer grows; export with --cache keyformer or scope"
            )
        if every < 1:
            raise RuntimeRefusal(f"decode steps between two rounds are {every}; give 1 or more")
        self._every = every

    def rows(self, counts: np.ndarray, visual_positions: np.ndarray) -> np.ndarray:
        """Tokens of a question that score, int64 [B, R], ascending, filled up with -1 in front; R = 0 for none.

        Args:
            counts: int64 [B], real tokens of each row.
            visual_positions: int64 [B, N].
        """
        record = self._record
        judges = record is not None and (record.candidates == ALL or visual_positions.shape[1] > 0)
        if record is None or not judges or record.candidates == SAID:
            return np.zeros((len(counts), 0), dtype=np.int64)
        chosen = []
        for row, count in enumerate(counts.tolist()):
            if record.rows == PROBE:
                number = min(record.count, count)
                chosen.append([(i + 1) * count // number - 1 for i in range(number)])
                continue
            first = 0 if record.rows == LAST else min(int(visual_positions[row, -1]) + 1, count - 1)
            number = min(record.count, count - first, max(1, int(record.part * count)))
            chosen.append(list(range(count - number, count)) if record.count else [])
        width = max(map(len, chosen))
        return np.array([[-1] * (width - len(row)) + row for row in chosen], dtype=np.int64)

    def decode_rows(self, live: np.ndarray) -> np.ndarray:
        """The same of a decode step: its one token in ``live`` rows (bool [B]), where its attention counts."""
        record = self._record
        if record is None or not self._every or not (record.accumulates or (self._steps + 1) % self._every == 0):
            return np.zeros((len(live), 0), dtype=np.int64)
        return np.where(live, 0, -1)[:, None]

    def feeds(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Inputs of the decoder for a step with these ``rows``."""
        return {} if self._record is None else {"score_rows": np.maximum(rows, 0)}

    def places(self, entries: Sequence[np.ndarray], live: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every group where a step's first token is written, and the last slot that it sees, int64 [B] each.

        Args:
            entries: of every group before the step, int64 [B] each.
            live: rows of a decode step, bool [B]; None for a question.
        """
        record = self._record
        if record is None or not record.ring or live is None or not self._settled:
            return [(filled, filled) for filled in entries]
        found = []
        for settled, filled in zip(self._settled, entries, strict=True):
            length = np.minimum(record.ring, settled)
            slot = settled - length + self._steps % np.maximum(length, 1)
            found.append((np.where(live, slot, filled), np.where(live, filled - 1, filled)))  # others write behind
        return found

    @property
    def rings(self) -> bool:
        """Whether answers go round in the caches, which then do not grow."""
        return self._record is not None and self._record.ring > 0

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
        rows: np.ndarray,
        visual_positions: np.ndarray,
        taken: Sequence[Sequence[np.ndarray]],
        before: Sequence[np.ndarray],
    ) -> Round:
        """Cut the caches behind a question.

        Args:
            graph: opens a graph of the bundle by its name.
            queries: what the decoder returned.
            rows: of :meth:`rows`.
            visual_positions: int64 [B, N].
            taken: of :meth:`taken`.
            before: of every group the entries before the step, int64 [B] each.

        Raises:
            RuntimeRefusal: the policy names entries that are not there.
        """
        record, self._steps = self._record, 0
        assert record is not None
        entries = [old + [len(row) for row in new] for old, new in zip(before, taken, strict=True)]
        if record.candidates == SAID or (record.candidates == VISUAL and not visual_positions.shape[1]):
            self._settled = entries
            return Round(entries, None)
        window, of_layer = self._window(entries), self._groups()
        kinds = np.stack([self._kinds(*of, visual_positions, window) for of in zip(taken, before, strict=True)])
        slots = [self._slots(rows, *of) for of in zip(taken, before, strict=True)]
        scores = self._scores(graph, queries, slots, kinds)
        order, stay = self._cut(graph, scores, kinds[of_layer], entries)
        self._settled = [stay[group.layers[0]] for group in self._contract.groups]
        if record.candidates == ALL:
            return Round(self._settled, None)
        held = [
            [
                new[one[:, first:count] - first]  # what was there before the step stays, in front
                for one, new, first, count in zip(order[layer], taken[group], before[group], stay[layer], strict=True)
            ]
            for layer, group in enumerate(of_layer)
        ]
        return Round(self._settled, held)

    def grown(
        self,
        graph: Callable[[str], Graph | Chain],
        queries: Mapping[str, Tensor],
        rows: np.ndarray,
        before: Sequence[np.ndarray],
        entries: list[np.ndarray],
    ) -> list[np.ndarray]:
        """Cut the caches behind a decode step where a round is due; returns the entries of every group.

        Args:
            graph, queries: as :meth:`after`'s.
            rows: of :meth:`decode_rows`.
            before, entries: of every group before and after the step, int64 [B] each.
        """
        self._steps += 1
        if self.rings:
            return list(before)
        if not self._every:
            return entries
        due = self._steps % self._every == 0
        if not rows.shape[1]:
            return entries
        record, window = self._record, self._window(entries)
        assert record is not None
        slot = np.arange(window)
        kinds = []
        for settled, filled in zip(self._settled, entries, strict=True):
            old = slot < settled[:, None]
            judged = (STAYS, CANDIDATE) if record.candidates == SAID else (CANDIDATE, FRESH)
            kinds.append(np.where(slot < filled[:, None], np.where(old, *judged), NO_ENTRY))
        of_group = np.stack(kinds)
        slots = [np.where(rows < 0, -1, start[:, None]) for start in before]
        scores = self._scores(graph, queries, slots, of_group)
        if not due:
            return entries
        _, stay = self._cut(graph, scores, of_group[self._groups()], entries, share=1.0)
        left = [stay[group.layers[0]] for group in self._contract.groups]
        if record.candidates == ALL:
            self._settled = left
        return left

    def _scores(
        self,
        graph: Callable[[str], Graph | Chain],
        queries: Mapping[str, Tensor],
        slots: Sequence[np.ndarray],
        kinds: np.ndarray,
    ) -> np.ndarray:
        """Scores of all layers' entries, float32 [L, B, Z, W], of this step or of all so far; ``slots`` [B, R] are
        where the rows are in every group's caches, ``kinds`` [G, B, W] what they hold."""
        record, window = self._record, kinds.shape[2]
        assert record is not None
        scores = np.stack(
            [
                self._score(graph(SCORE), queries[f"score_queries.{layer}"], slots[group], kinds[group], layer, window)
                for layer, group in enumerate(self._groups())
            ]
        )
        if not record.accumulates:
            return scores
        if self._sums is None:
            most = max(group.capacity for group in self._contract.groups)
            self._sums = np.zeros((*scores.shape[:3], most), dtype=np.float32)
        self._sums[..., :window] += scores
        return self._sums[..., :window].copy()

    def _groups(self) -> list[int]:
        """Group of every layer."""
        groups = {layer: index for index, group in enumerate(self._contract.groups) for layer in group.layers}
        return [groups[layer] for layer in range(len(groups))]

    def _window(self, entries: Sequence[np.ndarray]) -> int:
        most = max(group.capacity for group in self._contract.groups)
        return self._backend.window(max(1, max(int(each.max()) for each in entries)), most)

    def _kinds(
        self, taken: Sequence[np.ndarray], before: np.ndarray, visual_positions: np.ndarray, window: int
    ) -> np.ndarray:
        """Kinds of a group's entries, int64 [B, W]."""
        kinds = np.full((len(before), window), NO_ENTRY, dtype=np.int64)
        for row, (tokens, start) in enumerate(zip(taken, before.tolist(), strict=True)):
            kinds[row, :start] = STAYS
            is_visual = np.isin(tokens, visual_positions[row])
            kinds[row, start : start + len(tokens)] = np.where(is_visual, CANDIDATE, STAYS)
        if self._record is not None and self._record.candidates == ALL:
            kinds[kinds == STAYS] = CANDIDATE
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
        feeds |= self._noise(len(kinds), own)
        scores = self._backend.to_host(graph.run({**feeds, "past_key_values.key": cache})["key_scores"])
        return np.pad(scores, ((0, 0), (0, 0), (0, window - own)))

    def _noise(self, batch: int, window: int) -> dict[str, Tensor]:
        """What a policy that draws adds to the logits of this step: the same for all rows, layers and heads."""
        record = self._record
        if record is None or record.seed is None:
            return {}
        drawn = np.random.default_rng([record.seed, self._steps]).gumbel(size=window).astype(np.float32)
        first, rise = record.temperatures
        temperature = np.array(first + rise * self._steps, dtype=np.float32)
        return {"key_noise": np.ascontiguousarray(np.broadcast_to(drawn, (batch, window))), "temperature": temperature}

    def _cut(
        self,
        graph: Callable[[str], Graph | Chain],
        scores: np.ndarray,
        kinds: np.ndarray,
        entries: Sequence[np.ndarray],
        share: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Let the policy choose by scores [L, B, Z, W] and kinds [L, B, W], and compact every layer; returns its
        order [L, B, X, W] and counts [L, B]."""
        record, of_layer = self._record, self._groups()
        assert record is not None
        self.judged, share = (scores, kinds), self._share if share is None else share
        given = {"key_scores": scores, "key_kinds": kinds, "share": np.array(share, dtype=np.float32)}
        chosen = graph(POLICY).run(given)
        order, counts = (self._backend.to_host(chosen[name]) for name in ("order", "counts"))
        self._check(order, counts, np.stack([entries[group] for group in of_layer]))
        for layer, group in enumerate(of_layer):
            if (counts[layer] < entries[group]).any():
                name = record.compacts[group]
                feeds = self._feeds(name, order[layer], counts[layer], kinds[layer])
                self._compact(graph(name), layer, feeds)
        if self._sums is not None:
            kept = np.arange(order.shape[3]) < counts[:, :, None, None]
            self._sums[..., : order.shape[3]] = np.where(kept, np.take_along_axis(scores, order, axis=3), 0)
            self._sums[..., order.shape[3] :] = 0
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
