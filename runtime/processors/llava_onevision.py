"""LLaVA-OneVision: tiles as LLaVA-NeXT has them where a prompt brings one picture, of which large ones become fewer
tokens than patches; one tile each where it brings several.

A token of a large picture is a weighted sum of four patches, as torch's ``interpolate`` (bilinear, corners not aligned)
forms it on the CPU; so is one of a video, whose frames are a tile each. Transformers takes the pictures of a
conversation together; here those of a question are, since what earlier ones became is in the caches: one picture a
question is cut into tiles in every turn.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder, shown
from vlmtrim.runtime.processors import llava_next
from vlmtrim.runtime.processors.base import Pictures, View, evenly
from vlmtrim.runtime.video import Video

FRAMES = 32  # of a film, as the model was trained


class Processor(llava_next.Processor):
    """``pixel_values`` float32 [T, 3, H, W], the tiles; ``feature_index`` int64 [M, 4], the patches that each token is
    made of, and ``feature_weights`` float32 [M, 4], how much of each.
    """

    PINPOINTS = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))

    def __init__(self, files: Folder, contract: Contract):
        self._most_tiles = _most_tiles(files)
        super().__init__(files, contract)
        self._square = dataclasses.replace(self._tile, pad_to_square=True)

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures of one prompt -> inputs of the vision graph. Raises RuntimeRefusal where they are too many."""
        return self.of_rows([images])

    def of_rows(self, rows: Sequence[Sequence[Image.Image | Video]]) -> Pictures:
        """The same for several rows, in each of which a picture is alone or not."""
        images = [(image, sum(not isinstance(other, Video) for other in row) == 1) for row in rows for image in row]
        tiles = [self._cut(image, alone) for image, alone in images]
        pixels = self._stacked(tiles)
        newline, first = len(pixels) * math.prod(self._patches), 0
        index, weights, tokens = [], [], []
        for (image, alone), cut in zip(images, tiles, strict=True):
            parts = self._tokens(image, alone, range(first, first + len(cut)), newline)
            index += [part for part, _ in parts]
            weights += [part for _, part in parts]
            tokens.append(sum(len(part) for part, _ in parts))
            first += len(cut)
        inputs = {"feature_index": np.concatenate(index), "feature_weights": np.concatenate(weights)}
        return Pictures({"pixel_values": pixels, **inputs}, tuple(tokens))

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """FRAMES at equal distances, or those that the bundle has tokens for."""
        of_frame = math.prod(self._pooled)
        count = max(1, min(FRAMES, total, (self.contract.image_tokens - 1) // of_frame))
        return evenly(total, count)

    def views(self, images: Sequence[Image.Image]) -> list[View]:
        """As LLaVA-NeXT's of one picture; each of several whole, on a square."""
        if len(images) == 1:
            return super().views(images)
        patches = self._squeezed(0)
        return [
            View(self._square.framed(image), patches + number * (patches.size + 1))
            for number, image in enumerate(images)
        ]

    def _cut(self, image: Image.Image | Video, alone: bool) -> list[Image.Image]:
        """Tiles of a picture, or of a video, whose frames are squeezed into one each."""
        if isinstance(image, Video):
            return [self.framed(frame) for frame in image.opened]
        return self._tiles(image) if alone else [self._square.framed(image)]

    def _tokens(
        self, image: Image.Image | Video, alone: bool, tiles: range, newline: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Patches and weights of the tokens of a picture, or of a video, that became these tiles."""
        nothing = np.zeros((1, 0), dtype=np.int64)
        if isinstance(image, Video):
            frames = [_blended(self._squeezed(tile), self._pooled) for tile in tiles]
            return [*frames, _blended(nothing, (1, 0), newline)]
        grid = self._grid((image.height, image.width), tiles[0]) if alone else nothing
        return [_blended(self._squeezed(tiles[0]), self._patches), _blended(grid, self._laid(*grid.shape), newline)]

    @property
    def _pooled(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        rows, columns = self._patches
        return -(-rows // 2), -(-columns // 2)

    def _laid(self, rows: int, columns: int) -> tuple[int, int]:
        """Fewer where the patches are more than those of the most tiles, by a fifth or above."""
        ratio = math.sqrt(rows * columns / (self._most_tiles * math.prod(self._patches)))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def _expected(self) -> dict[str, tuple[int | None, ...]]:
        return {**super()._expected(), "feature_index": (None, 4), "feature_weights": (None, 4)}

    def _most_tokens(self, rows: int, columns: int) -> int:
        return min(rows * columns, 121 * self._most_tiles * math.prod(self._patches) // 100) + rows


def _most_tiles(files: Folder) -> int:
    """Tiles whose patches are the most tokens that a picture becomes, from the model's config. Raises BundleError."""
    value = files.json("config.json").get("vision_aspect_ratio", "anyres_max_9")
    found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", value) if isinstance(value, str) else None
    if found is None:
        where = files.path / "config.json"
        raise BundleError(f"{where}: vision_aspect_ratio is {shown(value)}; expected anyres_max_ and a number of tiles")
    return int(found[1])


def _blended(grid: np.ndarray, size: tuple[int, int], newline: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a grid of patches that is resampled to ``size`` rows and columns, each row's end a newline where there
    is one: the four patches of each, int64 [n, 4], and their weights, float32."""
    (top, over), (left, across) = (_along(grid.shape[axis], size[axis]) for axis in (0, 1))
    index = grid[top[:, None, :, None], left[None, :, None, :]]
    weights = over[:, None, :, None] * across[None, :, None, :]
    index, weights = index.reshape(*size, 4), weights.reshape(*size, 4)
    if newline is not None:
        whole = np.broadcast_to(np.array([1, 0, 0, 0], dtype=np.float32), (size[0], 1, 4))
        index = np.concatenate([index, np.full((size[0], 1, 4), newline)], axis=1)
        weights = np.concatenate([weights, whole], axis=1)
    return index.reshape(-1, 4).astype(np.int64), weights.reshape(-1, 4)


def _along(patches: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The two nearest patches of each token along an axis, [tokens, 2], and their weights, float32."""
    scale = np.float32(patches) / np.float32(max(tokens, 1))
    # multiplied and subtracted in one rounding, as torch's kernels do: the product is exact in float64
    at = (np.float64(scale) * (np.arange(tokens) + 0.5) - 0.5).astype(np.float32)
    at = np.maximum(at, np.float32(0))
    low = np.floor(at)
    over = at - low
    nearest = low.astype(np.int64)[:, None] + np.arange(2)
    return np.minimum(nearest, max(patches - 1, 0)), np.stack([1 - over, over], axis=1)
