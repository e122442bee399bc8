"""The scoring rules written a second time: one module a rule, named like it.

``rank(seen, visual, count, seed)`` returns what stays whatever it scores, as indices into the visual tokens, and the
scores of all of them, float32 [N].
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Seen:
    """What the scoring layer did in this step: attention [H, S, past + S], and query and key before their rotary
    embedding, [S, H Dh] and [S, KV Dh]; ``head_size`` is Dh."""

    head_size: int
    attention: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


def load_rule(name: str) -> Any:
    """The module of a rule."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def strided(count: int, given: int, seed: int) -> list[int]:
    """``count`` of ``given`` tokens at equal distances."""
    return [(i * given + seed % max(given, 1)) // count for i in range(count)]
