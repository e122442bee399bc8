"""SmolVLM in transformers as it is; a frame of a video is what its image processor makes of a picture that is not cut
into tiles, since the video processor needs torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.video import Video


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        parts = [self._tiles(image) for image in turn.images]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def _tiles(self, image: Any) -> dict[str, Tensor]:
        """Pixels [1, tiles, 3, H, W] of a picture or a video, and which of them are real."""
        if isinstance(image, Video):
            settings: dict[str, Any] = {"do_image_splitting": False, "return_tensors": "pt"}
            return dict(self._image_processor([list(image.frames)], **settings))
        return dict(self._image_processor([[image]], return_tensors="pt"))
