"""SmolVLM2: pictures as Idefics3 has them; every frame of a video is one tile, behind its time in words.

Frames, sizes and words are those of transformers' SmolVLM processors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.image import normalised
from vlmtrim.runtime.image_settings import LANCZOS, LONGEST_EDGE, ImageSettings
from vlmtrim.runtime.processors import idefics3
from vlmtrim.runtime.processors.base import Pictures, View
from vlmtrim.runtime.processors.idefics3 import longest_to, words_of
from vlmtrim.runtime.video import FASTEST, MOST_FRAMES, SLOWEST, Video

FPS, FRAMES = 1.0, 64  # frames a second of a film, and at most, of settings that name none
FRAME_SIZE = {"longest_edge": 4 * 364}  # pixels, likewise
SKIPPED = 1  # seconds at both ends of a long film
UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class Processor(idefics3.Processor):
    """``pixel_values`` float32 [T, 3, H, W], the tiles of all pictures and the frames of all videos."""

    video_mark = "<video>"

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        settings = ImageSettings.of_videos(files)
        sampling, plain = settings.part("video_sampling"), ("height", "width")
        self.film_fps = sampling.number("fps", SLOWEST, FASTEST, settings.number("fps", SLOWEST, FASTEST, FPS))
        most = settings.integer("num_frames", 1, MOST_FRAMES, FRAMES)
        self._most_frames = sampling.integer("max_frames", 1, MOST_FRAMES, most)
        own = settings.sides("size", plain) or sampling.sides("video_size", plain) or FRAME_SIZE
        if "longest_edge" not in own and set(own) != set(plain):
            raise settings.refuse(f"size of frames is {own}; expected a longest_edge, or height and width")
        self._frame_size = own
        self._frame_resample, self._frame_values = settings.resample(LANCZOS), settings.normalisation()

    def __call__(self, images: Sequence[Image.Image | Video]) -> Pictures:
        """RGB pictures and videos -> inputs of the vision graph. Raises RuntimeRefusal where they are more than it
        takes."""
        self.check_frames(images)
        made = []
        for image in images:
            made.append(self._film(image) if isinstance(image, Video) else super().__call__([image]))
        pixels = [part.inputs["pixel_values"] for part in made]
        self.check_tiles(len(images), sum(map(len, pixels)))
        return Pictures(
            {"pixel_values": np.concatenate(pixels)},
            tuple(tokens for part in made for tokens in part.tokens),
            words=tuple(words for part in made for words in part.words),
        )

    def frames(self, total: int, rate: float, fps: float) -> np.ndarray:
        """As SmolVLMVideoProcessor samples them: ``fps`` a second, at most 64, without the first and the last second of
        a long film; no more than the bundle takes."""
        seconds = total / rate
        most = min(self._most_frames, self.most_frames(math.prod(self._grid)))
        first, last = 0, total - 1
        if seconds - 2 * SKIPPED > self._most_frames * fps:
            skipped = SKIPPED * rate
            first, last = max(0, int(skipped)), min(int(total - skipped), total - 1)
        if first >= last:
            first, last = 0, total - 1
        return np.unique(np.linspace(first, last, max(1, min(round(fps * seconds), most)), dtype=np.int64))

    def shrunk(self, frame: Image.Image, count: int) -> Image.Image:
        """A frame scaled, then squeezed into one tile."""
        size = (self._frame_size.get("width", 0), self._frame_size.get("height", 0))
        if "longest_edge" in self._frame_size:
            size = longest_to(frame.size, min(self._frame_size["longest_edge"], LONGEST_EDGE))
        scaled = frame.resize(size, resample=self._frame_resample)
        return scaled.resize((self._side, self._side), resample=self._frame_resample)

    def views(self, images: Sequence[Image.Image | Video]) -> list[View]:
        """Of every picture its tiles put together again, and the one that it is squeezed into; a video's frames."""
        (high, wide), views, start = self._grid, [], 0
        for image in images:
            if isinstance(image, Video):
                squeezed = [self._squeezed_frame(image, frame) for frame in image.opened]
                tokens = np.arange(len(squeezed) * high * wide).reshape(-1, high, wide)
                found = [View(frame, places) for frame, places in zip(squeezed, tokens, strict=True)]
            else:
                found = super().views([image])
            views += [View(view.image, view.tokens + start) for view in found]
            start += sum(view.tokens.size for view in found)
        return views

    def _film(self, video: Video) -> Pictures:
        frames = [np.asarray(self._squeezed_frame(video, frame)) for frame in video.opened]
        values, each = self._frame_values, math.prod(self._grid)
        pixels = np.stack([normalised(frame, values.scale, values.mean, values.std) for frame in frames])
        return Pictures({"pixel_values": pixels}, (len(frames) * each,), words=(self._told(video, each),))

    def _squeezed_frame(self, video: Video, frame: Image.Image) -> Image.Image:
        """What becomes of a frame; one that :meth:`shrunk` made stays."""
        done = video.shrunk_from is not None and frame.size == (self._side, self._side)
        return frame if done else self.shrunk(frame, len(video.frames))

    def _told(self, video: Video, each: int) -> str:
        """What the prompt says of a video whose frames have ``each`` visual tokens."""
        seconds = video.seconds
        length = timedelta(seconds=int(seconds[-1] if video.duration is None else video.duration))
        count, shown = spelled(len(seconds)), words_of(0, 0, each)
        told = [f"\nFrame from {int(second // 60):02d}:{int(second % 60):02d}:{shown}" for second in seconds]
        intro = f"You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n"
        return "".join([intro, *told, "\n\n"])


def spelled(number: int) -> str:
    """A number below 10,000 in English words, as num2words has it: forty-two, one thousand, one hundred and one."""
    if number >= 1000:
        rest = number % 1000
        joint = "" if not rest else " and " if rest < 100 else ", "
        return f"{UNITS[number // 1000]} thousand{joint}{spelled(rest) if rest else ''}"
    if number >= 100:
        return f"{UNITS[number // 100]} hundred" + (f" and {spelled(number % 100)}" if number % 100 else "")
    if number >= 20:
        return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    return UNITS[number]
