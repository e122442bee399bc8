"""Gemma 3 in transformers as it is, told which tokens are a picture's; where an oracle calls the layers one by one,
masks are made here, of the positions that tokens had before any removal and of the pictures that those belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import FORMS, Form, reference
from vlmtrim.runtime.measure.check import Turn


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._form = Layers(self._text)
        FORMS[self._text] = self._form

    def reset(self) -> None:
        """Forget the conversation."""
        super().reset()
        self._kinds: list[Tensor] = []

    def _side(self) -> int:
        """Tokens along a picture, of several patches each."""
        return int(self.model.config.mm_tokens_per_image**0.5)

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        return {"pixel_values": super()._inputs(turn)["pixel_values"]}

    def _told(self, ids: Tensor, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 for tokens of pictures, of the whole conversation: masks are made by places in it."""
        self._kinds.append((ids == self._visual_token).long() * bool(pictures))
        return {"token_type_ids": torch.cat(self._kinds, 1)}

    def _positions(self, ids: Tensor, pictures: dict[str, Tensor]) -> Tensor:
        positions = super()._positions(ids, pictures)
        self._form.pictures = {}
        places = positions[0, ids[0] == self._visual_token].tolist() if pictures else []
        for place in places:
            number = self._form.pictures.get(place - 1, place)
            self._form.pictures[place] = number
        return positions


class Layers(Form):
    """Layers that see all entries and layers that see the last ones, each with frequencies of its own.

    ``pictures``: position of a visual token of this step -> a number of its picture.
    """

    def __init__(self, text: Any):
        self._text, self.pictures = text, dict[int, int]()

    def tables(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Form`."""
        return self._text.rotary_emb(hidden, positions, self._text.config.layer_types[layer])

    def mask(self, layer: int, positions: Tensor, past: int) -> Tensor:
        """See :class:`Form`."""
        at = positions.flatten()
        picture = torch.tensor([self.pictures.get(place, -1) for place in at.tolist()])
        together = (picture[:, None] == picture) & (picture >= 0)
        seen = torch.cat([torch.ones(len(at), past, dtype=torch.bool), (at[:, None] >= at) | together], 1)
        if self._text.config.layer_types[layer] == "sliding_attention":
            distance = past + torch.arange(len(at))[:, None] - torch.arange(past + len(at))
            seen &= distance < self._text.config.sliding_window  # entries that are there, not those that were
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
