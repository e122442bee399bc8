"""LLaVA-OneVision in transformers as it is; the pictures of a turn are those of one prompt, and a frame of a video is
the tile that its image processor squeezes a picture into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import films


class Reference(films.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.films.Reference` has it."""

    def _pictures(self, pictures: list[Any]) -> dict[str, Tensor]:
        return self._made([pictures])  # a flat list would be one prompt each

    def _frames(self, film: list[Any]) -> Tensor:
        return torch.stack([self._made([[frame]])["pixel_values"][0, 0] for frame in film])

    def _made(self, prompts: list[list[Any]]) -> dict[str, Tensor]:
        together: Any = prompts
        return dict(self._image_processor(together, return_tensors="pt"))
