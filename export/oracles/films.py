"""Models of transformers that have marks and features of their own for videos, run as they are.

A bundle's prompt has image tokens for pictures and videos alike, in the order of the turn; the model's own two marks
are put in their places before it runs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.video import Video


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it; the videos of a turn must have
    equally many frames."""

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        """Pixels of the turn's pictures and of its videos."""
        pictures = [image for image in turn.images if not isinstance(image, Video)]
        films = [list(image.frames) for image in turn.images if isinstance(image, Video)]
        self._order = [isinstance(image, Video) for image in turn.images]
        inputs = self._pictures(pictures) if pictures else {}
        if films:
            inputs["pixel_values_videos"] = torch.stack([self._frames(film) for film in films])
        return inputs

    @abstractmethod
    def _pictures(self, pictures: list[Any]) -> dict[str, Tensor]:
        """What get_image_features takes of the pictures of a prompt."""

    @abstractmethod
    def _frames(self, film: list[Any]) -> Tensor:
        """Pixels of a video's frames, [frames, 3, H, W]: video processors need torchvision."""

    def _parts(self, pictures: dict[str, Tensor]) -> list[Tensor]:
        """Features of every picture and every video, in order."""
        model = self.model.model
        still = {name: value for name, value in pictures.items() if name != "pixel_values_videos"}
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        if still:
            found[False] = list(model.get_image_features(**still).pooler_output)
        if "pixel_values_videos" in pictures:
            videos = pictures["pixel_values_videos"]
            frames = model.get_video_features(videos).pooler_output
            found[True] = list(frames.reshape(len(videos), -1, frames.shape[-1]))
        return [found[is_film].pop(0) for is_film in self._order]

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        return torch.cat(self._parts(pictures))

    def _forward(self, ids: Tensor, pictures: dict[str, Tensor]) -> Any:
        if "pixel_values_videos" not in pictures or self._oracle is not None or self._cutting is not None:
            return super()._forward(ids, pictures)
        places = torch.nonzero(ids[0] == self._visual_token)[:, 0]
        kinds = [torch.full((len(part),), film) for part, film in zip(self._parts(pictures), self._order, strict=True)]
        marked = ids.clone()
        marked[0, places[torch.cat(kinds)]] = self.model.config.video_token_id
        return super()._forward(marked, pictures)
