"""InternVL3: a picture is stretched to a grid of tiles; the whole of it comes last, where there is more than one. Every
frame of a video is one tile, behind its number in words.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.image import ImageProcessor, expect_inputs, normalised
from vlmtrim.runtime.image_settings import ImageSettings
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures, View
from vlmtrim.runtime.video import MOST_FRAMES, Video

FRAMES = 8  # of a film, as the model's authors show it, where settings name no other number
MOST_TILES = 12  # max_patches of settings that name none
LARGEST_GRID = 64  # tiles of any checkpoint
MARKS = {
    "start_image_token": "<img>",
    "context_image_token": "<IMG_CONTEXT>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


class Processor(base.Processor):
    """``pixel_values`` float32 [T, 3, H, W], the tiles. In the prompt a picture's tokens stand between two marks.

    The steps are those of transformers' GotOcr2 image processor (Pillow backend) as InternVL's processor calls it: it
    cuts pictures into tiles whatever ``crop_to_patches`` is in the settings. Bit-equal tiles, in its order.
    """

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        self._tile = dataclasses.replace(ImageProcessor.from_folder(files), pad_to_square=False)
        settings = ImageSettings.read(files)
        self._most = settings.integer("max_patches", 1, LARGEST_GRID, MOST_TILES)
        self._least = settings.integer("min_patches", 1, LARGEST_GRID, 1)
        if contract.image_grid is None:
            raise BundleError(f"{files.path / 'contract.json'}: image_grid is null; internvl needs that of a tile")
        self._tokens = contract.image_grid  # of one tile
        expect_inputs(files, contract, {"pixel_values": (None, 3, self._tile.height, self._tile.width)})
        most = self._most + (self._most > 1)
        if most * math.prod(self._tokens) > contract.image_tokens or "T" not in contract.dims:
            raise settings.refuse(
                f"max_patches is {self._most}, up to {most} tiles a picture; the bundle takes pictures of "
                f"{contract.image_tokens} tokens, {math.prod(self._tokens)} of them a tile: export the model again"
            )
        self._start, self._mark, self._end, self.video_mark = base.special_tokens(files, MARKS)
        settings = ImageSettings.of_videos(files)
        self._frame_resample, self._frame_values = settings.resample(), settings.normalisation()
        self._frames = settings.integer("num_frames", 1, MOST_FRAMES, FRAMES)

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures and videos -> inputs of the vision graph. Raises RuntimeRefusal where they are more than it
        takes."""
        self.check_frames(images)
        tiles = [self._made(image) for image in images]
        self.check_tiles(len(images), sum(map(len, tiles)))
        tokens = tuple(len(made) * math.prod(self._tokens) for made in tiles)
        words = tuple(self._words(*pair) for pair in zip(images, tokens, strict=True))
        return Pictures({"pixel_values": np.concatenate(tiles)}, tokens, words=words)

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture squeezed into one tile."""
        return self._stretched(image, 1, 1)

    def shrunk(self, frame: Image.Image, count: int) -> Image.Image:
        """A frame squeezed into one tile."""
        return frame.resize((self._tile.width, self._tile.height), resample=self._frame_resample)

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """FRAMES from the middles of as many equal parts, as the model was trained, or what the bundle takes."""
        count = min(self._frames, total, self.most_frames(math.prod(self._tokens)))
        return ((np.arange(count) + 0.5) * total / count).astype(np.int64)

    def views(self, images: Sequence[Image.Image | Video]) -> list[View]:
        """Of every picture what was cut into tiles, and where those are several the squeezed one; a video's frames."""
        rows, columns = self._tokens
        views, start = [], 0
        for image in images:
            if isinstance(image, Video):
                for frame in image.opened:
                    tokens = start + np.arange(rows * columns).reshape(rows, columns)
                    views.append(View(self.shrunk(frame, 1), tokens))
                    start += tokens.size
                continue
            across, down = self._grid(image)
            for wide, high in ((across, down), (1, 1))[: 1 + (across * down > 1)]:
                count = wide * high * rows * columns
                tokens = start + np.arange(count).reshape(high, wide, rows, columns)
                lines = tokens.transpose(0, 2, 1, 3).reshape(high * rows, wide * columns)
                views.append(View(self._stretched(image, wide, high), lines))
                start += count
        return views

    def _made(self, image: Image.Image | Video) -> np.ndarray:
        """Tiles of a picture, or a video's frames, float32 [n, 3, H, W]."""
        if not isinstance(image, Video):
            return np.stack([self._tile(tile) for tile in self._tiles(image)])
        values, frames = self._frame_values, [np.asarray(self.shrunk(frame, 1)) for frame in image.opened]
        return np.stack([normalised(frame, values.scale, values.mean, values.std) for frame in frames])

    def _words(self, image: Image.Image | Video, tokens: int) -> str:
        """What the prompt says of a picture or a video of so many tokens."""
        if not isinstance(image, Video):
            return f"{self._start}{self._mark * tokens}{self._end}"
        shown = f"{self._start}{self._mark * (tokens // len(image.frames))}{self._end}"
        return "\n".join(f"Frame{number}: {shown}" for number in range(1, len(image.frames) + 1))

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """The stretched picture's tiles row by row, then the squeezed picture where they are several."""
        across, down = self._grid(image)
        if across * down == 1:
            return [self.framed(image)]
        whole, width, height = self._stretched(image, across, down), self._tile.width, self._tile.height
        corners = itertools.product(range(0, whole.height, height), range(0, whole.width, width))
        cut = [whole.crop((left, top, left + width, top + height)) for top, left in corners]
        return [*cut, self.framed(image)]

    def _stretched(self, image: Image.Image, across: int, down: int) -> Image.Image:
        """The picture over so many tiles."""
        size = (across * self._tile.width, down * self._tile.height)
        return image.resize(size, resample=self._tile.resample)

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        """Columns and rows of tiles of a picture."""
        tile = self._tile.width * self._tile.height
        return best_grid(image.width, image.height, tile, self._least, self._most)


def best_grid(width: int, height: int, tile: int, least: int, most: int) -> tuple[int, int]:
    """Columns and rows, ``least`` to ``most`` tiles of ``tile`` pixels, that are nearest to a picture's proportions.

    Of grids that are equally near the largest counts whose tiles have less than twice the picture's pixels; where none
    of them has, the smallest.
    """
    if most == 1:
        return 1, 1
    grids = [(across, down) for across in range(1, most + 1) for down in range(1, most + 1)]
    grids = sorted((grid for grid in grids if least <= math.prod(grid) <= most), key=math.prod)
    distances = [abs(width / height - across / down) for across, down in grids]
    if not grids:
        return 1, 1
    first, *others = [grid for grid, distance in zip(grids, distances, strict=True) if distance == min(distances)]
    return next((grid for grid in reversed(others) if width * height > 0.5 * tile * math.prod(grid)), first)
