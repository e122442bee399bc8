"""InternVL in transformers as it is; its processor cuts pictures into tiles, its image processor alone may not.

Frames of a video are a tile each, which the image processor makes with the colours of the settings of videos: the video
processor needs torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.video import Video


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def __init__(self, model_class: Any, folder: Path, *arguments: Any, **named: Any):
        super().__init__(model_class, folder, *arguments, **named)
        self._processor = reference.own_processor(folder)
        path = folder / "video_preprocessor_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        self._colours = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}

    def _side(self) -> int:
        """Tokens along a tile; what lies on a grid is a picture of one tile."""
        config: Any = self.model.config
        vision = config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([self._tiles(image) for image in turn.images])}

    def _tiles(self, image: Any) -> Tensor:
        """[tiles, 3, H, W] of a picture or a video."""
        if isinstance(image, Video):
            settings = {"crop_to_patches": False, "return_tensors": "pt", **self._colours}
            return self._image_processor(list(image.frames), **settings)["pixel_values"]
        return self._processor(text=self._processor.image_token, images=[image], return_tensors="pt")["pixel_values"]
