"""Every cache policy a second time: ``<policy>.py`` has ``Oracle(policy)``, whose ``choose`` says which entries stay.

Written from the policies' descriptions on the reference model's own queries and keys; shares no code with
``vlmtrim.graphs``. Shapes: H query heads, KV key heads, R rows that score, W entries, N candidates, X sets of entries.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One layer behind a step.

    Attributes:
        queries: of the rows that the layer took, [H, R, Dh].
        keys: [KV, W, Dh].
        slots: where the rows are among the entries, int64 [R].
        candidates: which entries are judged, bool [W].
        scale: factor on queries times keys.
    """

    queries: Tensor
    keys: Tensor
    slots: Tensor
    candidates: Tensor
    scale: float

    @property
    def seen(self) -> Tensor:
        """Bool [R, W]."""
        return torch.arange(self.keys.shape[1]) <= self.slots[:, None]

    @property
    def logits(self) -> Tensor:
        """[H, R, W], -inf where a row does not see an entry."""
        keys = self.keys.repeat_interleave(len(self.queries) // len(self.keys), 0)
        return (self.queries @ keys.mT * self.scale).masked_fill(~self.seen, -torch.inf)

    @property
    def attention(self) -> Tensor:
        """[H, R, W]."""
        return self.logits.softmax(-1)

    def by_key_head(self, values: Tensor) -> Tensor:
        """Mean over the query heads of a key head, [H, W] -> [KV, W]."""
        return values.unflatten(0, (len(self.keys), -1)).mean(1)


@dataclass(frozen=True)
class Choice:
    """What a policy leaves in a layer: slots int64 [X, n], ascending, and what they were ranked by, [X, W]."""

    slots: Tensor
    ranking: Tensor


def load_oracle(policy: Mapping[str, Any]) -> Any:
    """The oracle of a contract's cache policy."""
    return importlib.import_module(f"{__name__}.{policy['policy'].replace('-', '_')}").Oracle(policy)


def rounded(share: float, count: int) -> int:
    """``round(share * count)`` in float32, halves to even."""
    return int(torch.round(torch.tensor(share, dtype=torch.float32) * count))


def best(view: View, ranking: Tensor, count: int) -> Choice:
    """The ``count`` candidates of highest value in each row of ``ranking`` [X, W], lowest slot first, and the rest."""
    kept = []
    for scores in ranking:
        order = torch.sort(scores.masked_fill(~view.candidates, -torch.inf), descending=True, stable=True).indices
        stays = ~view.candidates
        stays[order[:count]] = True
        kept.append(torch.nonzero(stays)[:, 0])
    return Choice(torch.stack(kept), ranking)


def uniform(views: Sequence[View], rankings: Sequence[Tensor], share: float) -> list[Choice]:
    """As many in every layer as the share says."""
    return [
        best(view, ranking, rounded(share, int(view.candidates.sum())))
        for view, ranking in zip(views, rankings, strict=True)
    ]


def rows_of(rows: str, count: int, part: float, tokens: int, visual: Tensor) -> list[int]:
    """Tokens of a step that score: the last ``count``, those behind the picture, or ``count`` at a uniform stride."""
    if rows == "probe":
        count = min(count, tokens)
        return [(i + 1) * tokens // count - 1 for i in range(count)]
    behind = list(range(tokens)) if rows == "last" else list(range(int(visual[-1]) + 1, tokens)) or [tokens - 1]
    return behind[-min(count, max(1, int(part * tokens))) :] if count else []
