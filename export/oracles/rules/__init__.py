"""The scoring rules written a second time: one module a rule, named like it.

``rank(seen, visual, count, seed)`` returns what stays whatever it scores, as indices into the visual tokens, best
first, and the scores of all of them, float32 [N]. A module with ``LOOKS`` is given :attr:`Seen.vision`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Seen:
    """What a step and its scoring layer did.

    Attributes:
        head_size, scale: Dh, and the factor on products of queries and keys.
        attention: probabilities of the layer [H, S, past + S].
        query, key: of the layer before their rotary embedding, [S, H Dh] and [S, KV Dh].
        rotated: keys of this step as the layer caches them, [KV, S, Dh].
        embeds: [S, D], what entered the first layer.
        entered, normed: [S, D], what entered the scoring layer, and what the norm behind its attention returned.
        seam: [S, D], what enters the first layer behind the selection.
        positions: [S], or [3, S] of time, row and column.
        removed: share of visual tokens that goes.
        side: rows, and columns, of a picture's visual tokens, where all pictures are alike.
        ahead: probabilities [H, S, S] of the layer behind the selection, on all of the step's tokens and nothing else.
        vision: what the vision tower looks at in this step's pictures, [N].
    """

    head_size: int
    scale: float = 1.0
    attention: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    rotated: Tensor | None = None
    embeds: Tensor | None = None
    entered: Tensor | None = None
    normed: Tensor | None = None
    seam: Tensor | None = None
    positions: Tensor | None = None
    removed: float = 0.0
    side: int | None = None
    vision: Tensor | None = None
    ahead: Callable[[], Tensor] | None = None


def load_rule(name: str) -> Any:
    """The module of a rule."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def strided(count: int, given: int, seed: int) -> list[int]:
    """``count`` of ``given`` tokens at equal distances."""
    return [(i * given + seed % max(given, 1)) // count for i in range(count)]


def places(seen: Seen, visual: Tensor) -> list[tuple[int, int, int]]:
    """(picture, row, column) of every visual token: by M-RoPE positions, or of square pictures one after the other."""
    assert seen.positions is not None
    if seen.positions.dim() == 2:
        first = seen.positions[:, visual[:1]]
        return [tuple(place) for place in (seen.positions[:, visual] - first).T.tolist()]
    assert seen.side is not None
    each = seen.side**2
    return [(i // each, i % each // seen.side, i % each % seen.side) for i in range(len(visual))]
