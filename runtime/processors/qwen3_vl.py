"""Qwen3-VL: as Qwen2-VL for still pictures; the tower's learned grid of positions is resampled to each picture's grid.
Every two frames of a video stand in the prompt as a picture does, behind their time in words.

Corners and weights are those of transformers' ``get_vision_interpolation_indices_and_weights`` (bilinear, corners
aligned), in numpy. Sizes of frames are those of its Qwen3VLVideoProcessor, which counts the pixels of all frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import Folder, number
from vlmtrim.runtime.image_settings import MOST_PIXELS, ImageSettings
from vlmtrim.runtime.processors import qwen2_5_vl
from vlmtrim.runtime.processors.base import Pictures
from vlmtrim.runtime.processors.qwen2_5_vl import LEAST_FRAMES, MOST_FRAMES
from vlmtrim.runtime.video import MOST_FRAMES as MOST_OF_ANY
from vlmtrim.runtime.video import Video

MOST_POSITIONS = 2**20  # of the learned grid; the checkpoints have 2304
START, IMAGE, VIDEO, END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
LEAST_OF_ALL, MOST_OF_ALL = 128 * 32 * 32, 768 * 32 * 32  # pixels of all frames, of settings that name none
MOST_TOKENS = 768  # of two frames, where settings have cap_pixels_per_frame


class Processor(qwen2_5_vl.Processor):
    """Inputs as :mod:`vlmtrim.export.families.qwen3_vl` states them; grids as :mod:`qwen2_5_vl` does.

    The words of a video take the place of all three marks that the template writes, as in the processor that came with
    the model (transformers 4.57), which its authors' fine-tuning code calls. Since 5.10 transformers replaces the
    middle one alone, and leaves the other two around all frames.
    """

    video_mark = f"{START}{VIDEO}{END}"

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        config = files.json("config.json")["vision_config"]
        where = f"{files.path / 'config.json'}: vision_config.num_position_embeddings"
        self._side = math.isqrt(int(number(config.get("num_position_embeddings", 2304), where, 1, MOST_POSITIONS)))
        settings = ImageSettings.of_videos(files)
        size = settings.sides("size", (), MOST_PIXELS)
        self._least_of_all = size.get("shortest_edge", LEAST_OF_ALL)
        self._most_of_all = size.get("longest_edge", MOST_OF_ALL)
        self._capped = settings.boolean("cap_pixels_per_frame", False)
        self._least_frames = settings.integer("min_frames", 1, MOST_PIXELS, LEAST_FRAMES)
        self._longest = min(settings.integer("max_frames", 1, MOST_PIXELS, MOST_FRAMES), MOST_OF_ANY)
        self._frame_resample, self._frame_values = settings.resample(), settings.normalisation()

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures and videos -> inputs of the vision graph."""
        pictures = super().__call__(images)
        sizes = [(rows * self._merge, columns * self._merge) for rows, columns, *_ in pictures.grids]
        places = np.split(pictures.inputs["patch_positions"], np.cumsum(pictures.tokens)[:-1])
        index, weights = zip(*map(self._resampled, places, sizes), strict=True)
        inputs = {**pictures.inputs, "grid_index": np.concatenate(index), "grid_weights": np.concatenate(weights)}
        words = []
        if any(isinstance(image, Video) for image in images):
            words = [self._words(*pair) for pair in zip(images, pictures.tokens, strict=True)]
        return Pictures(inputs, pictures.tokens, pictures.grids, tuple(words))

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """As Qwen3VLVideoProcessor samples them: ``fps`` a second from the first to the last; no more than the bundle
        has tokens for."""
        wanted = min(max(int(total / rate * fps), self._least_frames), self._longest, total, self._most_frames)
        return np.linspace(0, total - 1, wanted).round().astype(np.int64)

    def positions(
        self, ids: np.ndarray, counts: np.ndarray, start: np.ndarray, pictures: Pictures | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """M-RoPE [3, B, S]; two frames of a video have the positions of a picture: their time is in words."""
        if pictures is not None:
            each = tuple((rows, columns, 0) for rows, columns, *times in pictures.grids for _ in times)
            pictures = dataclasses.replace(pictures, grids=each)
        return super().positions(ids, counts, start, pictures)

    def _interval(self, fps: float) -> np.float32:
        return np.float32(0)

    def _frame_size(self, width: int, height: int, count: int) -> tuple[int, int]:
        """Width and height of each of ``count`` frames, whose pixels are counted together; where an odd one is repeated
        behind that count, they are still no more than the bundle takes."""
        together, side = self._frames_per_token, self._patch * self._merge
        full, shown, pixels = -(-count // together), max(count, together), side**2
        room = self.contract.image_tokens * together * pixels
        scale = max(side / min(width, height), 1.0)
        high, wide = int(height * scale), int(width * scale)
        most = min(self._most_of_all, room)
        if self._capped:
            each = max(min(MOST_TOKENS * pixels, most // shown), int(self._least_of_all * 1.05))
            most = min(each * shown, room)
        least = min(self._least_of_all, most)
        found = qwen2_5_vl.fitting_size(high, wide, side, least, most, shown, round(shown / together) * together)
        if math.prod(found) * full * together > room:
            found = qwen2_5_vl.fitting_size(high, wide, side, 0, room, full * together, full * together)
        self._check_tokens((width, height), math.prod(found) // pixels, full)
        return found[1], found[0]

    def _words(self, image: Image.Image | Video, tokens: int) -> str:
        """What the prompt says of a picture or a video, its image tokens among it."""
        if not isinstance(image, Video):
            return IMAGE * tokens
        together, seconds = self._frames_per_token, image.seconds
        seconds += seconds[-1:] * (-len(seconds) % together)
        times = [(seconds[i] + seconds[i + together - 1]) / 2 for i in range(0, len(seconds), together)]
        shown = f"{START}{IMAGE * (tokens // len(times))}{END}"
        return "".join(f"<{time:.1f} seconds>{shown}" for time in times)

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
