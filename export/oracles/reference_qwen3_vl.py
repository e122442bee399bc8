"""Qwen3-VL in transformers as it is; where an oracle calls the layers one by one, DeepStack's features are added behind
the first ones, at tokens that are found again by their three positions, which no two tokens share with a visual one.

A bundle's prompt has image tokens for pictures and videos alike, in the order of the turn; the model's own two marks
are put in their places before it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import ADDS, reference
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.video import Video


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it.

    Frames of videos must have the size that the model sees, in pairs: the video processor, which would scale and repeat
    them, needs torchvision, so they are prepared by the image processor, with the colours of the other's settings.
    """

    def __init__(self, model_class: Any, folder: Path, *arguments: Any, **named: Any):
        self._added: list[Tensor] = []
        self._order: list[bool] = []
        self._places = torch.zeros(3, 0, dtype=torch.int64)
        super().__init__(model_class, folder, *arguments, **named)
        path = folder / "video_preprocessor_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        self._colours = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
        ADDS[self._text] = self._add

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        self._order = [isinstance(image, Video) for image in turn.images]
        still = [image for image in turn.images if not isinstance(image, Video)]
        films = [self._film(list(image.frames)) for image in turn.images if isinstance(image, Video)]
        inputs = dict(self._image_processor(still, return_tensors="pt")) if still else {}
        if films:
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in films])
            inputs["video_grid_thw"] = torch.tensor([grid for _, grid in films])
        return inputs

    def _film(self, frames: list[Any]) -> tuple[Tensor, list[int]]:
        """Patches [T rows columns, C 2 p p] of the pairs of a video's frames, and (T, rows, columns)."""
        made = self._image_processor(frames, return_tensors="pt", **self._colours)
        (_, rows, columns), side = made["image_grid_thw"][0].tolist(), self._image_processor.patch_size
        assert (columns * side, rows * side) == frames[0].size and len(frames) % 2 == 0
        pairs = made["pixel_values"].reshape(len(frames) // 2, 2, rows * columns, 3, 2, side, side)
        patches = pairs[:, :, :, :, 0].permute(0, 2, 3, 1, 4, 5).reshape(len(frames) // 2 * rows * columns, -1)
        return patches, [len(frames) // 2, rows, columns]

    def _forward(self, ids: Tensor, pictures: dict[str, Tensor]) -> Any:
        plain = self._oracle is None and self._cutting is None
        return super()._forward(self._marked(ids, pictures) if plain else ids, pictures)

    def _marked(self, ids: Tensor, pictures: dict[str, Tensor]) -> Tensor:
        """Token ids with the mark of videos at the tokens of each."""
        marked = ids.clone()
        if "video_grid_thw" not in pictures:
            return marked
        counts = {
            film: iter((pictures[name].prod(dim=1) // self._image_processor.merge_size**2).tolist())
            for film, name in ((False, "image_grid_thw"), (True, "video_grid_thw"))
            if name in pictures
        }
        kinds = [torch.full((next(counts[film]),), film) for film in self._order]
        marked[0, self._visual(ids)] = torch.where(
            torch.cat(kinds), self.model.config.video_token_id, self._visual_token
        )
        return marked

    def _visual(self, ids: Tensor) -> Tensor:
        """Whether each token [S] is one of a picture or a video."""
        return (ids[0] == self._visual_token) | (ids[0] == self.model.config.video_token_id)

    def _positions(self, ids: Tensor, pictures: dict[str, Tensor]) -> Tensor:
        positions = super()._positions(self._marked(ids, pictures), pictures)
        self._places = positions[:, 0, self._visual(ids)]
        self._added = []  # a step without pictures adds nothing
        return positions

    def _features(self, pictures: dict[str, Tensor]) -> Tensor:
        model, found = self.model.model, {}
        if "pixel_values" in pictures:
            found[False] = model.get_image_features(pictures["pixel_values"], pictures["image_grid_thw"])
        if "pixel_values_videos" in pictures:
            found[True] = model.get_video_features(pictures["pixel_values_videos"], pictures["video_grid_thw"])
        levels = {film: zip(made.pooler_output, *made.deepstack_features, strict=True) for film, made in found.items()}
        features, *self._added = map(torch.cat, zip(*(next(levels[film]) for film in self._order), strict=True))
        return features

    def _add(self, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
        if index >= len(self._added):
            return hidden
        same = (positions[:, 0, :, None] == self._places[:, None]).all(0)  # [S, N]
        return hidden + same.to(hidden.dtype) @ self._added[index]
