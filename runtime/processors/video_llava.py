"""Video-LLaVA: a picture becomes one square of patches, a video as many as it has frames, each with its class token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import ImageProcessor, expect_inputs
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures, View, evenly
from vlmtrim.runtime.video import Video

FRAMES = 8  # of a film


class Processor(base.Processor):
    """Inputs as :mod:`vlmtrim.export.families.video_llava` states them; frames are prepared as pictures are."""

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        self._image_processor = ImageProcessor.from_folder(files)
        size = self._image_processor.height, self._image_processor.width
        squares = dict.fromkeys(("pixel_values", "frame_values"), (None, 3, *size))
        expect_inputs(files, contract, {**squares, "feature_index": (None,)})
        if contract.image_grid is None:
            raise BundleError(
                f"{files.path / 'contract.json'}: image_grid is null; video_llava needs that of a picture"
            )
        self._patches = np.arange(contract.image_grid[0] * contract.image_grid[1])

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures and videos -> inputs of the vision graph. Raises RuntimeRefusal where a video is too long."""
        pictures = [image for image in images if not isinstance(image, Video)]
        films = [image.opened for image in images if isinstance(image, Video)]
        self._check([len(film) for film in films])
        still, frame = len(self._patches), 1 + len(self._patches)
        first, after = 0, max(1, len(pictures)) * still  # in the table of features
        index = []
        for image in images:
            if isinstance(image, Video):
                index.append(np.arange(after, after := after + len(image.frames) * frame))
            else:
                index.append(np.arange(first, first := first + still))
        inputs = {
            "pixel_values": self._squares(pictures),
            "frame_values": self._squares([frame for film in films for frame in film]),
            "feature_index": np.concatenate(index).astype(np.int64),
        }
        return Pictures(inputs, tuple(map(len, index)))

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture resized and cropped, without normalisation."""
        return self._image_processor.framed(image)

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """FRAMES at equal distances, as the model was trained, or what the bundle takes."""
        count = max(1, min(FRAMES, total, self.contract.image_tokens // (1 + len(self._patches))))
        return evenly(total, count)

    def views(self, images: Sequence[Image.Image | Video]) -> list[View]:
        """Every picture and every frame framed; class tokens lie nowhere."""
        rows, columns = self.contract.image_grid or (0, 0)
        views, start = [], 0
        for image in images:
            class_tokens = int(isinstance(image, Video))
            for part in image.opened if isinstance(image, Video) else (image,):
                start += class_tokens
                views.append(View(self.framed(part), start + self._patches.reshape(rows, columns)))
                start += len(self._patches)
        return views

    def _squares(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [n, 3, H, W]; one black square for none."""
        if not images:
            return np.zeros((1, 3, self._image_processor.height, self._image_processor.width), dtype=np.float32)
        return np.stack([self._image_processor(image) for image in images])

    def _check(self, films: Sequence[int]) -> None:
        most = self.contract.image_tokens // (1 + len(self._patches))
        if films and max(films) > most:
            raise RuntimeRefusal(
                f"a video of {max(films)} frames, {1 + len(self._patches)} visual tokens each; the bundle takes {most} "
                "frames of one: give fewer, or export with more --image-tokens"
            )
