"""Qwen3-VL in transformers as it is; where an oracle calls the layers one by one, DeepStack's features are added behind
the first ones, at tokens that are found again by their three positions, which no two tokens share with a visual one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import ADDS, reference


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def __init__(self, *arguments: Any, **named: Any):
        self._added: list[Tensor] = []
        self._places = torch.zeros(3, 0, dtype=torch.int64)
        super().__init__(*arguments, **named)
        ADDS[self._text] = self._add

    def _positions(self, ids: Tensor, pictures: dict[str, Tensor]) -> Tensor:
        positions = super()._positions(ids, pictures)
        self._places = positions[:, 0, ids[0] == self._visual_token]
        self._added = []  # a step without pictures adds nothing
        return positions

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        found = self.model.get_image_features(**pictures)
        self._added = [torch.cat(list(features)) for features in found.deepstack_features]
        return torch.cat(list(found.pooler_output))

    def _add(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        if index >= len(self._added):
            return hidden
        same = (positions[:, 0, :, None] == self._places[:, None]).all(0)  # [S, N]
        return hidden + same.to(hidden.dtype) @ self._added[index]
