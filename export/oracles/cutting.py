"""Cuts the caches of the reference model as a cache policy's oracle says, one conversation, batch 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, watched
from vlmtrim.export.oracles.caches import Choice, View, load_oracle, rows_of


@dataclass(frozen=True)
class Held:
    """Per layer: the step's tokens that stay, int64 [X, n]; and what tokens were ranked by, [X, S], NaN where not."""

    tokens: list[Tensor]
    ranking: list[Tensor]


class Cutting:
    """A cache policy on a text model of transformers.

    Args:
        text: the model's language model.
        record: the contract's record of the policy (:class:`vlmtrim.graphs.keeping.CachePolicy`), by name.
        share: of the candidates, that stays.
    """

    def __init__(self, text: Any, record: Mapping[str, Any], share: float):
        self._text, self._record, self._share = text, record, share
        self._settled: list[int] = []
        self._sums: list[Tensor] | None = None
        self._steps = 0
        self._oracle = load_oracle(record["policy"])
        watched.watch(text)

    def lengths(self, cache: Any) -> list[int]:
        """Entries of every layer."""
        return [cache.get_seq_length(index) for index in range(len(self._text.layers))]

    def reset(self) -> None:
        """Begin a new conversation."""
        self._settled, self._sums, self._steps = [], None, 0

    def cut(self, cache: Any, before: list[int], tokens: int, visual: Tensor, kept: Kept) -> Held | None:
        """Cut the caches behind a question; returns what stays of it, None where nothing of it alone is judged.

        Args:
            cache: of the model.
            before: entries of every layer before the step.
            tokens: of the step.
            visual: indices of its visual tokens.
            kept: what a selection kept of the step.
        """
        record, self._steps = self._record, 0
        if record["candidates"] == "said" or (record["candidates"] == "visual" and not len(visual)):
            self._settled = self.lengths(cache)
            return None
        rows = rows_of(record["rows"], record["count"], record["part"], tokens, visual)
        taken = [self._taken(cache, index, start, tokens, kept) for index, start in enumerate(before)]
        views = [self._view(index, before[index], own, rows, visual, tokens) for index, own in enumerate(taken)]
        if record["candidates"] == "all":
            every = [torch.ones_like(view.candidates) for view in views]
            views = [replace(view, candidates=judged) for view, judged in zip(views, every, strict=True)]
            self._round(cache, views, self._share, 0)
            return None
        choices = self._oracle.choose(views, self._share)
        held, ranking = [], []
        for index, (choice, own, start) in enumerate(zip(choices, taken, before, strict=True)):
            self._keep(cache.layers[index], choice)
            held.append(own[choice.slots[:, start:] - start])
            by_token = torch.full((len(choice.ranking), tokens), torch.nan)
            by_token[:, own] = choice.ranking[:, start:].float()
            ranking.append(by_token)
        self._settled = self.lengths(cache)
        return Held(held, ranking)

    def make_room(self, cache: Any) -> None:
        """Before a decode step, where answers go round: forget the entry whose place its word takes."""
        if self._record["ring"]:
            for layer, slot in self._places(cache, self._steps):
                stays = torch.arange(layer.keys.shape[2]) != slot
                layer.keys, layer.values = layer.keys[:, :, stays], layer.values[:, :, stays]

    def grown(self, cache: Any) -> None:
        """Cut the caches behind a decode step where a round is due."""
        record = self._record
        self._steps += 1
        if record["ring"]:
            for layer, slot in self._places(cache, self._steps - 1):
                layer.keys, layer.values = (_moved(states, slot) for states in (layer.keys, layer.values))
        if not record["every"]:
            return
        due = self._steps % record["every"] == 0
        if record["candidates"] == "all":
            every = [torch.ones(length, dtype=torch.bool) for length in self.lengths(cache)]
            views = [self._newest(index, judged) for index, judged in enumerate(every)]
            self._round(cache, views, 1.0, self.lengths(cache)[0] - self._settled[0], due)
        elif due:
            said = [torch.arange(n) >= old for n, old in zip(self.lengths(cache), self._settled, strict=True)]
            views = [self._newest(index, of) for index, of in enumerate(said)]
            for index, choice in enumerate(self._oracle.choose(views, self._share)):
                self._keep(cache.layers[index], choice)

    def _places(self, cache: Any, step: int) -> Iterator[tuple[Any, int]]:
        """(cache of a layer, slot of the word of a step)."""
        for layer, settled in zip(cache.layers, self._settled, strict=True):
            length = min(self._record["ring"], settled)
            yield layer, settled - length + step % length

    def _newest(self, index: int, candidates: Tensor) -> View:
        """A layer behind a decode step."""
        queries, keys, scale = watched.last(self._text.layers[index])
        return View(queries[:, -1:], keys, torch.tensor([len(candidates) - 1]), candidates, scale)

    def _round(self, cache: Any, views: list[View], share: float, fresh: int, due: bool = True) -> None:
        """Add the scores of a step to those before it, and cut by the sums where it is due."""
        first, rise = self._record["temperatures"]
        drawn = np.random.default_rng([self._record["seed"], self._steps])
        noise = torch.from_numpy(drawn.gumbel(size=max(view.keys.shape[1] for view in views)).astype(np.float32))
        sums = []
        for index, view in enumerate(views):
            own = self._oracle.scores(view, noise[: view.keys.shape[1]], first + rise * self._steps)
            if self._sums is not None:
                own[:, : self._sums[index].shape[1]] += self._sums[index]
            sums.append(own)
        self._sums = sums
        if due:
            for index, choice in enumerate(self._oracle.choose(views, share, sums, fresh)):
                self._keep(cache.layers[index], choice)
                self._sums[index] = sums[index].gather(1, choice.slots)
            self._settled = self.lengths(cache)

    def _taken(self, cache: Any, index: int, before: int, tokens: int, kept: Kept) -> Tensor:
        """The step's tokens that a layer's cache took."""
        if kept.layers is not None:
            return kept.layers[index]
        grown = cache.get_seq_length(index) - before
        return torch.arange(tokens) if grown == tokens or kept.tokens is None else kept.tokens

    def _view(self, index: int, before: int, taken: Tensor, rows: list[int], visual: Tensor, tokens: int) -> View:
        queries, keys, scale = watched.last(self._text.layers[index])
        there = [row for row in rows if bool((taken == row).any())]
        places = torch.searchsorted(taken, torch.tensor(there, dtype=torch.int64))
        own = torch.tensor(there, dtype=torch.int64) if queries.shape[1] == tokens else places
        if keys.shape[1] > before + len(taken):  # attended to under a mask
            keys = keys[:, torch.cat([torch.arange(before), before + taken])]
        candidates = torch.cat([torch.zeros(before, dtype=torch.bool), torch.isin(taken, visual)])
        return View(queries[:, own], keys, before + places, candidates, scale)

    def _keep(self, layer: Any, choice: Choice) -> None:
        """Leave in a layer's cache what stays; each head its own where they choose apart."""
        if self._record["policy"].get("merge"):
            layer.keys, layer.values = (_merged(states, choice.slots[0]) for states in (layer.keys, layer.values))
            return
        index = choice.slots.expand(layer.keys.shape[1], -1)[None, :, :, None]
        index = index.expand(-1, -1, -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def _merged(states: Tensor, slots: Tensor) -> Tensor:
    """Every entry [B, KV, W, Dh] averaged into the nearest of those at ``slots`` [n], the earlier of two."""
    distance = (torch.arange(states.shape[2])[:, None] - slots).abs()
    nearest = distance.argmin(1)  # the first of equals
    return torch.stack([states[:, :, nearest == i].mean(2) for i in range(len(slots))], 2)


def _moved(states: Tensor, slot: int) -> Tensor:
    """The last entry of [B, KV, W, Dh] moved to ``slot``."""
    return torch.cat([states[:, :, :slot], states[:, :, -1:], states[:, :, slot:-1]], 2)
