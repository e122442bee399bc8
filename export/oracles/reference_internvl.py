"""InternVL in transformers as it is; its processor cuts pictures into tiles, its image processor alone may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def __init__(self, model_class: Any, folder: Path, *arguments: Any, **named: Any):
        super().__init__(model_class, folder, *arguments, **named)
        self._processor = reference.own_processor(folder)

    def _side(self) -> int:
        """Tokens along a tile; what lies on a grid is a picture of one tile."""
        config: Any = self.model.config
        vision = config.vision_config
        return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        text = self._processor.image_token * len(turn.images)
        made = self._processor(text=text, images=list(turn.images), return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}
