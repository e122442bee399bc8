"""LLaVA-NeXT: a picture becomes the tiles that its shape needs, and as many visual tokens as its part of them has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.image import ImageProcessor, expect_inputs
from vlmtrim.runtime.image_settings import ImageSettings
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures, View

MOST_PINPOINTS = 256  # LLaVA-OneVision's 36 are the most of any checkpoint

Size = tuple[int, int]  # height, width


class Processor(base.Processor):
    """``pixel_values`` float32 [T, 3, H, W], the tiles; ``feature_index`` int64 [M], the patch that each token is.

    The steps are those of transformers' LLaVA-NeXT image processor (Pillow backend) and of its packing of features:
    bit-equal tiles, the same tokens in the same order. Tiles that only pad a batch of pictures are not made.
    """

    # Resolutions (height, width) of settings that name none.
    PINPOINTS: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        # do_pad means padding tiles here, nothing about the picture
        self._tile = dataclasses.replace(ImageProcessor.from_folder(files), pad_to_square=False)
        named = ImageSettings.read(files).pairs("image_grid_pinpoints", MOST_PINPOINTS)
        self._pinpoints = named or list(self.PINPOINTS)
        if contract.image_grid is None:
            where = files.path / "contract.json"
            raise BundleError(f"{where}: image_grid is null; {contract.family} needs that of a tile")
        self._patches = contract.image_grid  # of one tile
        self._check(files)

    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures -> inputs of the vision graph. Raises RuntimeRefusal where they are more than it takes."""
        tiles = [self._tiles(image) for image in images]
        pixels = self._stacked(tiles)
        newline = len(pixels) * math.prod(self._patches)
        index, first = [], 0
        for image, cut in zip(images, tiles, strict=True):
            index.append(self._feature_index((image.height, image.width), first, newline))
            first += len(cut)
        inputs = {"pixel_values": pixels, "feature_index": np.concatenate(index)}
        return Pictures(inputs, tuple(len(part) for part in index))

    def _stacked(self, tiles: Sequence[Sequence[Image.Image]]) -> np.ndarray:
        """Every picture's tiles, as float32 [T, 3, H, W]. Raises RuntimeRefusal where they are more than fit."""
        self.check_tiles(len(tiles), sum(map(len, tiles)))
        return np.stack([self._tile(tile) for cut in tiles for tile in cut])

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture squeezed into one tile, which is the first of its tiles."""
        return image.resize((self._tile.width, self._tile.height), resample=self._tile.resample)

    def views(self, images: Sequence[Image.Image]) -> list[View]:
        """Of every picture the squeezed tile, and its part of the other tiles; newline tokens lie on neither."""
        rows, columns = self._patches
        tall, wide = self._tile.height // rows, self._tile.width // columns
        views, start = [], 0
        for image in images:
            views.append(View(self.framed(image), start + np.arange(rows * columns).reshape(rows, columns)))
            start += rows * columns
            padded = self._padded(image)
            patches = np.indices((padded.height // tall, padded.width // wide)).transpose(1, 2, 0)
            seen = _unpadded(patches, (image.height, image.width))
            laid = self._laid(seen.shape[0], seen.shape[1])
            lines = np.arange(laid[0] * (laid[1] + 1)).reshape(laid[0], laid[1] + 1)
            if seen.size:
                (top, left), (bottom, right) = seen[0, 0], seen[-1, -1] + 1
                inner = padded.crop((left * wide, top * tall, right * wide, bottom * tall))
                views.append(View(inner, start + lines[:, :-1]))
            start += lines.size
        return views

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """The squeezed picture, then the tiles of the scaled and padded one, row by row."""
        padded = self._padded(image)
        across, down = self._tile.width, self._tile.height
        corners = [(left, top) for top in range(0, padded.height, down) for left in range(0, padded.width, across)]
        return [self.framed(image), *(padded.crop((x, y, x + across, y + down)) for x, y in corners)]

    def _padded(self, image: Image.Image) -> Image.Image:
        """The picture scaled into its best resolution, black beside it."""
        height, width = best_resolution((image.height, image.width), self._pinpoints)
        inner = _fitted((image.height, image.width), (height, width))
        canvas = Image.new("RGB", (width, height))
        scaled = image.resize((inner[1], inner[0]), resample=self._tile.resample)
        canvas.paste(scaled, ((width - inner[1]) // 2, (height - inner[0]) // 2))
        return canvas

    def _feature_index(self, size: Size, first: int, newline: int) -> np.ndarray:
        """Patches of one picture whose tiles start at number ``first``: the squeezed tile, then the rows, int64 [n]."""
        grid = self._grid(size, first)
        lines = np.concatenate([grid, np.full((len(grid), 1), newline)], axis=1)
        return np.concatenate([self._squeezed(first).ravel(), lines.ravel()]).astype(np.int64)

    def _squeezed(self, first: int) -> np.ndarray:
        """Numbers of a tile's patches, [rows, columns]."""
        rows, columns = self._patches
        return first * rows * columns + np.arange(rows * columns).reshape(rows, columns)

    def _grid(self, size: Size, first: int) -> np.ndarray:
        """Numbers of the patches that a picture covers of its tiles behind the squeezed one, which is tile ``first``;
        [rows, columns]."""
        rows, columns = self._patches
        patches = np.arange(rows * columns).reshape(rows, columns)
        height, width = best_resolution(size, self._pinpoints)
        down, across = height // self._tile.height, width // self._tile.width
        tile = first + 1 + np.arange(down * across).reshape(down, across)
        grid = tile[:, None, :, None] * patches.size + patches[None, :, None, :]
        return _unpadded(grid.reshape(down * rows, across * columns), size)

    def _laid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that a grid of patches becomes, newlines aside."""
        return rows, columns

    def _expected(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the vision graph's inputs."""
        return {"pixel_values": (None, 3, self._tile.height, self._tile.width), "feature_index": (None,)}

    def _most_tokens(self, rows: int, columns: int) -> int:
        """Of a grid of patches at most, whatever part of it a picture covers."""
        return rows * (columns + 1)

    def _check(self, files: Folder) -> None:
        rows, columns = self._patches
        down, across = self._tile.height, self._tile.width
        expect_inputs(files, self.contract, self._expected())
        whole = not any(height % down or width % across for height, width in self._pinpoints)
        most = max(self._most_tokens(h // down * rows, w // across * columns) for h, w in self._pinpoints)
        if not whole or rows * columns + most != self.contract.image_tokens or "T" not in self.contract.dims:
            raise BundleError(
                f"{files.path}: tiles of {down} x {across} pixels for {list(self._pinpoints)} "
                f"(preprocessor_config.json) do not fit the model, whose config has other image_grid_pinpoints; "
                "take both files from one checkpoint and export again"
            )


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the picture's pixels when it is scaled into it; of equals the smallest, first."""
    height, width = size

    def merit(target: Size) -> tuple[int, int]:
        scale = min(target[1] / width, target[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target[0] * target[1]

    return max(pinpoints, key=merit)


def _fitted(size: Size, target: Size) -> Size:
    """Largest size of the same aspect ratio within the target, rounded up."""
    across, down = target[1] / size[1], target[0] / size[0]
    if across < down:
        return min(math.ceil(size[0] * across), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * down), target[1])


def _unpadded(grid: np.ndarray, size: Size) -> np.ndarray:
    """The part of a grid of patches that a picture of this size covers, centred."""
    height, width = size
    rows, columns = grid.shape[:2]
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[margin : rows - margin]
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, margin : columns - margin]
