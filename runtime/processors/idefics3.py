"""Idefics3 and the first SmolVLM: a picture becomes square tiles, row by row, and itself squeezed into one; the prompt
says which is which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.image import expect_inputs, normalised
from vlmtrim.runtime.image_settings import LANCZOS, ImageSettings
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures, View

LONGEST_EDGE, TILE = {"longest_edge": 1456}, {"longest_edge": 364}  # pixels, of settings that name none
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


class Processor(base.Processor):
    """``pixel_values`` float32 [T, 3, H, W], the tiles of all pictures.

    The steps are those of transformers' SmolVLM and Idefics3 image processors (Pillow backend), bit-equal, and the
    words those of its processors. Tiles that only pad a batch of pictures are not made. The model in transformers takes
    a tile whose pixels are all 0 for such a one, and then misses its features; mean and deviation of published settings
    make no pixel 0, and here such a tile is a picture like others.
    """

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        settings = ImageSettings.read(files)
        size = settings.sides("size", ("height", "width")) or LONGEST_EDGE
        tile = settings.sides("max_image_size", ("height", "width")) or TILE
        if "longest_edge" not in size or "longest_edge" not in tile:
            raise settings.refuse(f"size is {size}, max_image_size {tile}; expected a longest_edge in both")
        if not settings.boolean("do_resize", True):
            raise settings.refuse("do_resize is false; tiles are made of pictures of a size")
        self._longest, self._side = size["longest_edge"], tile["longest_edge"]
        self._splits = settings.boolean("do_image_splitting", True)
        self._resample, self._values = settings.resample(LANCZOS), settings.normalisation()
        if contract.image_grid is None or "T" not in contract.dims:
            raise BundleError(
                f"{files.path / 'contract.json'}: {contract.family} needs an image_grid, that of a tile, and dims.T"
            )
        self._grid = contract.image_grid
        expect_inputs(files, contract, {"pixel_values": (None, 3, self._side, self._side)})
        across = math.ceil(self._longest / self._side) if self._splits else 1
        most = contract.image_tokens // math.prod(self._grid)
        if (across > 1 and across**2 + 1 > most) or most < 1:
            raise settings.refuse(
                f"size.longest_edge {self._longest} makes {across**2 + 1} tiles of {self._side} pixels, the bundle "
                f"takes {most} a picture; give a smaller longest_edge and export again"
            )

    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures -> inputs of the vision graph. Raises RuntimeRefusal where they are more than it takes."""
        scaled = [self.framed(image) for image in images]
        grids = [self._tiled(image) for image in scaled]
        tiles = [rows * columns + 1 if rows else 1 for rows, columns in grids]
        self.check_tiles(len(images), sum(tiles))
        pixels = [
            self._pixels(tile) for image, grid in zip(scaled, grids, strict=True) for tile in self._cut(image, grid)
        ]
        each = math.prod(self._grid)
        return Pictures(
            {"pixel_values": np.stack(pixels)},
            tuple(each * count for count in tiles),
            words=tuple(words_of(*grid, each) for grid in grids),
        )

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture at the size at which it is cut into tiles."""
        image = image.resize(longest_to(image.size, self._longest), resample=self._resample)
        if not self._splits:
            return self._squeezed(image)
        return image.resize(_whole_tiles(image.size, self._side), resample=self._resample)

    def views(self, images: Sequence[Image.Image]) -> list[View]:
        """Of every picture its tiles put together again, and the one that it is squeezed into."""
        (high, wide), views, start = self._grid, [], 0
        for image in map(self.framed, images):
            rows, columns = self._tiled(image)
            if rows:
                tokens = np.arange(start, start + rows * columns * high * wide).reshape(rows, columns, high, wide)
                views.append(View(image, tokens.transpose(0, 2, 1, 3).reshape(rows * high, columns * wide)))
                start += tokens.size
            views.append(View(self._squeezed(image), start + np.arange(high * wide).reshape(high, wide)))
            start += high * wide
        return views

    def _tiled(self, image: Image.Image) -> tuple[int, int]:
        """Rows and columns of tiles of a scaled picture; zeros where it is one tile as it is."""
        rows, columns = image.height // self._side, image.width // self._side
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def _cut(self, image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
        """The tiles of a scaled picture, row by row, and behind them the picture as one tile."""
        rows, columns = grid
        side = self._side
        corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        return [*(image.crop((x, y, x + side, y + side)) for x, y in corners), self._squeezed(image)]

    def _squeezed(self, image: Image.Image) -> Image.Image:
        return image.resize((self._side, self._side), resample=self._resample)

    def _pixels(self, tile: Image.Image) -> np.ndarray:
        """float32 [3, side, side]."""
        return normalised(np.asarray(tile), self._values.scale, self._values.mean, self._values.std)


def words_of(rows: int, columns: int, each: int) -> str:
    """What the prompt says of a picture of so many tiles with ``each`` visual tokens."""
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{column}>{IMAGE * each}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    return "".join([*lines, "\n" if lines else "", AROUND, WHOLE, IMAGE * each, AROUND])


def longest_to(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height whose longer one is ``longest``, the other even, unless the ratio leaves nothing of it."""
    width, height = size
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(short + short % 2, 1)
    short = int(longest * ratio)
    return max(short + short % 2, 1), longest


def _whole_tiles(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height in whole tiles; the shorter one follows from the longer one's, by the ratio."""
    (width, height), ratio = size, size[0] / size[1]
    if width >= height:
        width = math.ceil(width / side) * side
        return width, math.ceil(int(width / ratio) / side) * side
    height = math.ceil(height / side) * side
    return math.ceil(int(height * ratio) / side) * side, height
