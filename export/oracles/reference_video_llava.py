"""Video-LLaVA in transformers as it is; frames of a video are prepared by its image processor, as pictures are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.video import Video


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it.

    The prompt's image tokens stand for features of pictures and videos alike, in the order of the turn; the model's own
    two marks are put in their places before it runs.
    """

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        """Pixels of the turn's pictures and of its videos, which must have equally many frames."""
        pictures = [image for image in turn.images if not isinstance(image, Video)]
        films = [list(image.frames) for image in turn.images if isinstance(image, Video)]
        self._order = [isinstance(image, Video) for image in turn.images]
        inputs = {}
        if pictures:
            inputs["pixel_values"] = self._pixels(pictures)
        if films:
            inputs["pixel_values_videos"] = torch.stack([self._pixels(film) for film in films])
        return inputs

    def _pixels(self, pictures: list[Any]) -> Tensor:
        return self._image_processor(pictures, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        model, still, films = self.model.model, [], []
        if "pixel_values" in pictures:
            still = list(model.get_image_features(pictures["pixel_values"]).pooler_output)
        if "pixel_values_videos" in pictures:
            videos = pictures["pixel_values_videos"]
            frames = model.get_video_features(videos).pooler_output
            films = list(frames.reshape(len(videos), -1, frames.shape[-1]))
        return torch.cat([films.pop(0) if is_film else still.pop(0) for is_film in self._order])

    def _forward(self, ids: Tensor, pictures: dict[str, Tensor]) -> Any:
        if not pictures or self._oracle is not None or self._cutting is not None:
            return super()._forward(ids, pictures)
        places = torch.nonzero(ids[0] == self._visual_token)[:, 0]
        vision: Any = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        films = pictures.get("pixel_values_videos")
        of_film = 0 if films is None else films.shape[1] * (1 + patches)
        kinds = torch.cat([torch.full((of_film if film else patches,), film) for film in self._order])
        marked = ids.clone()
        marked[0, places[kinds]] = self.model.config.video_token_id
        return super()._forward(marked, pictures)
