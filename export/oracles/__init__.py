"""The other side of parity: unpatched models, and every selection written a second time, in PyTorch.

``<method>.py`` has ``Oracle(selection)``, ``rules/<rule>.py`` has ``rank``; they share no code with ``vlmtrim.graphs``.
``reference.py`` and ``reference_<family>.py`` run the models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What an oracle kept of a step: ascending indices that later layers take, or those of every layer.

    token_margins: of a choice in stages, by how much of a threshold each token of the step is from changing sides.
    margins: of every layer's choice, by how much of its threshold a visual token would have to change to change sides.
    nearest: of a step that attends to chosen cache entries, the same of the entry that is nearest to changing sides.
    """

    tokens: Tensor | None = None
    layers: list[Tensor] | None = None
    margins: list[Tensor] | None = None
    token_margins: Tensor | None = None
    nearest: float = float("inf")


def load_oracle(selection: Mapping[str, Any]) -> Any:
    """The oracle of a contract's selection."""
    module = importlib.import_module(f"{__name__}.{selection['method'].replace('-', '_')}")
    return module.Oracle(selection)


# Text model -> what it adds to the states behind a layer: (layer, states [1, S, D], positions) -> states [1, S, D].
ADDS: WeakKeyDictionary[Any, Callable[[int, Tensor, Tensor], Tensor]] = WeakKeyDictionary()


# Text model -> what its layers take in place of the tables and the mask that all others share.
FORMS: WeakKeyDictionary[Any, Form] = WeakKeyDictionary()


class Form:
    """How a text model's layers are called where not all are alike."""

    def tables(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, S, Dh] of a layer."""
        raise NotImplementedError

    def mask(self, layer: int, positions: Tensor, past: int) -> Tensor:
        """Additive [1, 1, S, past + S] of a layer whose cache holds ``past`` entries, for tokens at these positions."""
        raise NotImplementedError


def tables(text: Any, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, S, Dh] of a layer."""
    return FORMS[text].tables(layer, hidden, positions) if text in FORMS else text.rotary_emb(hidden, positions)


def mask(text: Any, layer: int, positions: Tensor, past: int) -> Tensor:
    """Additive [1, 1, S, past + S] of a layer whose cache holds ``past`` entries, for tokens at these positions."""
    return FORMS[text].mask(layer, positions, past) if text in FORMS else causal(positions.shape[-1], past)


def added(text: Any, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [1, S, D] behind layer ``index``, with what the model adds to them there."""
    return ADDS[text](index, hidden, positions) if text in ADDS else hidden


def run_layer(text: Any, index: int, cache: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [1, S, D] behind layer ``index`` of transformers' text model, which appends to its cache."""
    output = text.layers[index](
        hidden,
        attention_mask=mask(text, index, positions, cache.get_seq_length(index)),
        position_ids=positions,
        position_embeddings=tables(text, index, hidden, positions),
        past_key_values=cache,
        use_cache=True,
    )
    return added(text, index, output[0] if isinstance(output, tuple) else output, positions)


def causal(tokens: int, past: int) -> Tensor:
    """Additive mask [1, 1, tokens, past + tokens]."""
    above = torch.full((tokens, past + tokens), torch.finfo(torch.float32).min)
    return above.triu(diagonal=past + 1)[None, None]
