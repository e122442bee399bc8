"""Qwen2.5-VL: pictures and videos keep their proportions; every 28 x 28 pixels or so become a visual token.

Sizes, order of the patches, attention windows and positions are those of transformers' Qwen2VLImageProcessor and
Qwen2_5_VLModel (``get_vision_window_index``, ``get_rope_index``), in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder, number, shown
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import expect_inputs, normalised
from vlmtrim.runtime.image_settings import LARGEST_PATCH, MOST_PIXELS, MOST_TOGETHER, ImageSettings, Normalisation
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures, evenly
from vlmtrim.runtime.video import Video

LEAST_FRAMES, MOST_FRAMES = 4, 768  # of a film, as transformers has them
MOST_ELONGATED = 200  # transformers' limit on long side / short side


@dataclass(frozen=True)
class _Grid:
    """Visual tokens of one picture: ``times`` has a number for each of its frames, a still picture is one frame."""

    rows: int
    columns: int
    times: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.times) * self.rows * self.columns


class Processor(base.Processor):
    """Inputs as :mod:`vlmtrim.export.tracing.qwen_vl` states them; grids are (rows, columns, time of each frame)."""

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        settings = ImageSettings.read(files)
        self._patch = settings.integer("patch_size", 1, LARGEST_PATCH, 14)
        self._merge = settings.integer("merge_size", 1, MOST_TOGETHER, 2)
        self._frames_per_token = settings.integer("temporal_patch_size", 1, MOST_TOGETHER, 2)
        size = settings.sides("size", (), MOST_PIXELS)
        self._least = settings.integer("min_pixels", 1, MOST_PIXELS, size.get("shortest_edge", 56 * 56))
        self._most = settings.integer("max_pixels", 1, MOST_PIXELS, size.get("longest_edge", 28 * 28 * 1280))
        self._resample, self._values = settings.resample(), settings.normalisation()
        self._frame_resample, self._frame_values = self._resample, self._values
        config = files.json("config.json").get("vision_config")
        where = f"{files.path / 'config.json'}: vision_config"
        if not isinstance(config, dict):
            raise BundleError(f"{where} is {shown(config)}; expected an object")
        self._tokens_per_second = number(config.get("tokens_per_second", 4), f"{where}.tokens_per_second", 1e-3, 1e3)
        self._window = _window_side(contract)
        expect_inputs(files, contract, self._expected())

    def _expected(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes of the vision graph's inputs."""
        values, patches = 3 * self._frames_per_token * self._patch**2, self._merge**2
        shapes: dict[str, tuple[int | None, ...]] = {
            "pixel_values": (None, patches, values),
            "patch_positions": (None, patches, 2),
            "frame_ids": (None,),
        }
        if self._window:
            shapes |= {"window_tokens": (None, self._window**2), "window_slots": (None,)}
        return shapes

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures and videos -> inputs of the vision graph."""
        patches, grids = zip(*(self._prepare(image) for image in images), strict=True)
        frames = [grid for grid in grids for _ in grid.times]
        inputs = {
            "pixel_values": np.concatenate(patches),
            "patch_positions": np.concatenate([self._patch_positions(frame) for frame in frames]),
            "frame_ids": np.repeat(np.arange(len(frames)), [frame.rows * frame.columns for frame in frames]),
        }
        if self._window:
            inputs |= _windows(frames, self._window)
        return Pictures(
            inputs,
            tuple(grid.tokens for grid in grids),
            tuple((grid.rows, grid.columns, *grid.times) for grid in grids),
        )

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture at the size that the model sees."""
        return image.resize(self._size(*image.size, 1), resample=self._resample)

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """As Qwen2VLVideoProcessor samples them: ``fps`` a second, 4 to 768, full groups of those that share tokens; no
        more than the bundle has tokens for."""
        together = self._frames_per_token
        most = min(MOST_FRAMES, total, self._most_frames) // together * together
        wanted = min(max(total / rate * fps, LEAST_FRAMES), most, total) // together * together
        return evenly(total, max(1, int(wanted)))

    def shrunk(self, frame: Image.Image, count: int) -> Image.Image:
        """As :meth:`framed`, where frames share what a picture may have."""
        return frame.resize(self._frame_size(*frame.size, count), resample=self._frame_resample)

    def positions(
        self, ids: np.ndarray, counts: np.ndarray, start: np.ndarray, pictures: Pictures | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """M-RoPE [3, B, S]: text counts on along all three axes, a picture's tokens by frame, row and column.

        The text behind a picture goes on after its longer side; a row's next step, after its largest number.
        """
        plain, after = super().positions(ids, counts, start, None)
        positions = np.tile(plain, (3, 1, 1))
        if pictures is None:
            return positions, after
        grids = iter(pictures.grids)
        for row, (count, first) in enumerate(zip(counts, start, strict=True)):
            is_visual = ids[row, :count] == self.contract.image_token_id
            found = _row_positions(is_visual, grids) + first
            positions[:, row, :count] = found
            after[row] = found.max() + 1
        return positions, after

    @property
    def _most_frames(self) -> int:
        """Of a video, each group of those that share tokens as large as the smallest picture."""
        share = self.contract.image_tokens * (self._patch * self._merge) ** 2 // self._least
        return self._frames_per_token * max(share, 1)

    def _interval(self, fps: float) -> np.float32:
        """Positions between two frames of a video."""
        seconds = np.float32(self._frames_per_token / fps)
        return np.float32(self._tokens_per_second) * seconds

    def _prepare(self, image: Image.Image | Video) -> tuple[np.ndarray, _Grid]:
        """(patches [tokens, G, C T p p], grid) of a picture or a video."""
        together = self._frames_per_token
        if isinstance(image, Video):
            frames, size = image.opened, self._frame_size(*image.size, len(image.frames))
            frames += frames[-1:] * (-len(frames) % together)
            count = len(frames) // together
            times = (np.arange(count) * self._interval(image.fps)).astype(np.int64)
            frames = [frame.resize(size, resample=self._frame_resample) for frame in frames]
            pixels = np.stack([self._pixels(frame, self._frame_values) for frame in frames])
        else:
            count, times = 1, np.zeros(1, dtype=np.int64)
            pixels = np.repeat(self._pixels(self.framed(image), self._values)[None], together, axis=0)
        side = self._patch * self._merge
        rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
        split = pixels.reshape(
            count, together, 3, rows, self._merge, self._patch, columns, self._merge, self._patch
        ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
        grid = _Grid(rows, columns, tuple(times.tolist()))
        return split.reshape(grid.tokens, self._merge**2, -1), grid

    @staticmethod
    def _pixels(image: Image.Image, values: Normalisation) -> np.ndarray:
        """float32 [3, height, width]."""
        return normalised(np.asarray(image), values.scale, values.mean, values.std)

    def _frame_size(self, width: int, height: int, count: int) -> tuple[int, int]:
        """Width and height that the model sees of one of ``count`` frames; they share what a picture may have."""
        return self._size(width, height, -(-count // self._frames_per_token))

    def _size(self, width: int, height: int, frames: int) -> tuple[int, int]:
        """Width and height that tokens fill; ``frames`` of them share what the bundle takes of one picture."""
        side, share = self._patch * self._merge, self.contract.image_tokens // frames
        most = min(self._most, max(share, 1) * side**2)
        high, wide = fitting_size(height, width, side, min(self._least, most), most)
        self._check_tokens((width, height), (high // side) * (wide // side), frames)
        return wide, high

    def _check_tokens(self, size: tuple[int, int], tokens: int, frames: int) -> None:
        """Raise RuntimeRefusal where each of so many frames of a size has more tokens than its share."""
        share = self.contract.image_tokens // frames
        if tokens > share:
            of = f"one of {frames} frames" if frames > 1 else "a picture"
            raise RuntimeRefusal(
                f"a picture of {size[0]} x {size[1]} pixels makes {tokens} visual tokens at least, the bundle "
                f"takes {share} of {of}; crop it, give fewer frames, or export with more --image-tokens"
            )

    def _patch_positions(self, frame: _Grid) -> np.ndarray:
        """Row and column [tokens, G, 2] of a frame's patches."""
        merge = self._merge
        places = np.indices((frame.rows * merge, frame.columns * merge)).transpose(1, 2, 0)
        blocks = places.reshape(frame.rows, merge, frame.columns, merge, 2).transpose(0, 2, 1, 3, 4)
        return blocks.reshape(-1, merge**2, 2)


def _window_side(contract: Contract) -> int:
    """Tokens along a side of an attention window; 0 where the vision graph takes none."""
    for tensor in contract.graphs["vision"].inputs:
        if tensor.name == "window_tokens" and tensor.shape and isinstance(tensor.shape[-1], int):
            return math.isqrt(tensor.shape[-1])
    return 0


def fitting_size(
    height: int, width: int, side: int, least: int, most: int, frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """Multiples of ``side`` with about the same proportions and between ``least`` and ``most`` pixels.

    Those of a video are of all ``frames`` together, which count as ``counted`` where whole groups of them do.
    """
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise RuntimeRefusal(
            f"the picture is {width} x {height} pixels; the model takes pictures up to {MOST_ELONGATED} times as long "
            "as wide: crop it"
        )
    fitting = [round(length / side) * side for length in (height, width)]
    pixels = counted * fitting[0] * fitting[1]
    if pixels > most:
        shrink = math.sqrt((frames * height * width) / most)
        fitting = [max(side, math.floor(length / shrink / side) * side) for length in (height, width)]
    elif pixels < least:
        grow = math.sqrt(least / (frames * height * width))
        fitting = [math.ceil(length * grow / side) * side for length in (height, width)]
    return fitting[0], fitting[1]


def _windows(frames: Sequence[_Grid], side: int) -> dict[str, np.ndarray]:
    """``window_tokens`` [V, side^2], padded with -1, and ``window_slots`` [M]: where each token is in it."""
    windows, first = [], 0
    for frame in frames:
        high, wide = (-(-length // side) * side for length in (frame.rows, frame.columns))
        tokens = np.full((high, wide), -1, dtype=np.int64)
        tokens[: frame.rows, : frame.columns] = first + np.arange(frame.rows * frame.columns).reshape(frame.rows, -1)
        cut = tokens.reshape(high // side, side, wide // side, side).transpose(0, 2, 1, 3)
        windows.append(cut.reshape(-1, side * side))
        first += frame.rows * frame.columns
    table = np.concatenate(windows)
    slots = np.empty(first, dtype=np.int64)
    filled = np.flatnonzero(table >= 0)
    slots[table.ravel()[filled]] = filled
    return {"window_tokens": table, "window_slots": slots}


def _row_positions(is_visual: np.ndarray, grids: Iterator[tuple[int, ...]]) -> np.ndarray:
    """Positions [3, tokens] of one row, from 0; every run of visual tokens takes the next grids."""
    pieces, token, position = [], 0, 0
    while token < len(is_visual):
        if is_visual[token]:
            rows, columns, *times = next(grids)
            places = np.stack(np.meshgrid(times, np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1)
            pieces.append(places + position)
            position += max(rows, columns)
        else:
            visual = np.flatnonzero(is_visual[token:])
            length = int(visual[0]) if len(visual) else len(is_visual) - token
            pieces.append(np.tile(position + np.arange(length), (3, 1)))
            position += length
        token += pieces[-1].shape[1]
    return np.concatenate(pieces, axis=1)
