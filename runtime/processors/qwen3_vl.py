"""Qwen3-VL: as Qwen2-VL for still pictures; the tower's learned grid of positions is resampled to each picture's grid.

Corners and weights are those of transformers' ``get_vision_interpolation_indices_and_weights`` (bilinear, corners
aligned), in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import Folder, number
from vlmtrim.runtime.processors import qwen2_5_vl
from vlmtrim.runtime.processors.base import Pictures
from vlmtrim.runtime.video import Video

MOST_POSITIONS = 2**20  # of the learned grid; the checkpoints have 2304


class Processor(qwen2_5_vl.Processor):
    """Inputs as :mod:`vlmtrim.export.families.qwen3_vl` states them; grids as :mod:`qwen2_5_vl` does."""

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        config = files.json("config.json")["vision_config"]
        where = f"{files.path / 'config.json'}: vision_config.num_position_embeddings"
        self._side = math.isqrt(int(number(config.get("num_position_embeddings", 2304), where, 1, MOST_POSITIONS)))

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures -> inputs of the vision graph."""
        pictures = super().__call__(images)
        sizes = [(rows * self._merge, columns * self._merge) for rows, columns, _ in pictures.grids]
        places = np.split(pictures.inputs["patch_positions"], np.cumsum(pictures.tokens)[:-1])
        index, weights = zip(*map(self._resampled, places, sizes), strict=True)
        inputs = {**pictures.inputs, "grid_index": np.concatenate(index), "grid_weights": np.concatenate(weights)}
        return Pictures(inputs, pictures.tokens, pictures.grids)

    def _expected(self) -> dict[str, tuple[int | None, ...]]:
        four = (None, self._merge**2, 4)
        return {**super()._expected(), "grid_index": four, "grid_weights": four}

    def _resampled(self, places: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Of patches at ``places`` [n, G, 2] of a picture of ``size`` patches: four corners of the learned grid, int64
        [n, G, 4], and their weights, float32."""
        (top, over), (left, across) = (self._along(places[..., axis], size[axis]) for axis in (0, 1))
        index = top[..., :, None] * self._side + left[..., None, :]
        weights = over[..., :, None] * across[..., None, :]
        return index.reshape(*places.shape[:2], 4), weights.reshape(*places.shape[:2], 4)

    def _along(self, place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The two nearest places of the learned grid along an axis, [n, G, 2], and their weights."""
        source = place.astype(np.float32) * np.float32(self._side - 1) / np.float32(max(size - 1, 1))
        floor = np.floor(source)
        step = np.arange(2)
        distance = np.abs(source[..., None] - floor[..., None] - step.astype(np.float32))
        taps = np.clip(floor.astype(np.int64)[..., None] + step, 0, self._side - 1)
        return taps, np.maximum(1 - distance, 0).astype(np.float32)
