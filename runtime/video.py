"""A video as a model sees it: frames at equal distances in time. And what counts as the pictures of a question."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import TAKEN, Picture, load_image

MOST_FRAMES = 4096
# Of all frames together (768 MB of RGB), a hundred of 1920 x 1080 or a thousand of 512 x 512.
MOST_PIXELS = 256 * 1024 * 1024
SLOWEST, FASTEST = 1e-3, 1e3  # frames a second
LONGEST = 1e7  # seconds of a film


@dataclass(frozen=True)
class Video:
    """Frames in order, of one size.

    Attributes:
        frames: pictures as :func:`load_image` takes them, at least one and at most MOST_FRAMES.
        fps: frames a second, as they are given here (of a film, those that were taken out of it).
        times: seconds of the film at which each frame is shown; empty where they follow from ``fps``.
        duration: seconds of the whole film; None where nobody says.
        shrunk_from: width and height of the film, where its frames have the size that a model sees already.
    """

    frames: Sequence[Picture]
    fps: float = 2.0
    times: Sequence[float] = ()
    duration: float | None = None
    shrunk_from: tuple[int, int] | None = None

    @staticmethod
    def of(paths: Sequence[str | Path], fps: float) -> Video:
        """A video of the files in the order given; folders stand for their files by name. Raises RuntimeRefusal."""
        return Video([file for name in paths for file in _files(name)], fps)

    @property
    def opened(self) -> list[Image.Image]:
        """The frames of one that :meth:`load` made."""
        return [frame for frame in self.frames if isinstance(frame, Image.Image)]

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown."""
        return list(self.times) or [number / self.fps for number in range(len(self.frames))]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the frames had before anything was done to them."""
        return self.shrunk_from or self.opened[0].size

    def load(self) -> Video:
        """The same with every frame opened as RGB. Raises RuntimeRefusal where they cannot be one video."""
        if not self.frames:
            raise RuntimeRefusal("a video without frames; give at least one")
        if len(self.frames) > MOST_FRAMES:
            raise RuntimeRefusal(f"a video of {len(self.frames)} frames; give at most {MOST_FRAMES}")
        if isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not SLOWEST <= self.fps <= FASTEST:
            raise RuntimeRefusal(
                f"a video of {self.fps!r} frames a second; give a number above 0, from {SLOWEST:g} to {FASTEST:g}"
            )
        if self.times and len(self.times) != len(self.frames):
            raise RuntimeRefusal(f"a video of {len(self.frames)} frames with {len(self.times)} times; give one of each")
        for seconds in (*self.times, self.duration or 0.0):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST:
                raise RuntimeRefusal(f"a time in a video is {seconds!r}; give seconds from 0 to {LONGEST:g}")
        frames: list[Image.Image] = []
        for number, source in enumerate(self.frames, 1):
            try:
                frames.append(load_image(source))
            except RuntimeRefusal as refusal:
                raise RuntimeRefusal(f"frame {number} of a video of {len(self.frames)}: {refusal}") from refusal
            width, height = frames[0].size
            if width * height * len(self.frames) > MOST_PIXELS:
                raise RuntimeRefusal(
                    f"a video of {len(self.frames)} frames of {width} x {height} pixels; all together may have "
                    f"{MOST_PIXELS // 1_000_000} million: give fewer frames, or scale them down"
                )
            if frames[-1].size != (width, height):
                sizes = [(width, height), frames[-1].size]
                raise RuntimeRefusal(f"the frames of a video have 2 sizes or more, among them {sorted(sizes)}")
        return dataclasses.replace(self, frames=tuple(frames), fps=float(self.fps))


def load_picture(source: Picture | Video) -> Image.Image | Video:
    """Open a picture, or every frame of a video. Raises RuntimeRefusal."""
    return source.load() if isinstance(source, Video) else load_image(source)


def as_pictures(images: Any) -> list[Picture | Video]:
    """The pictures of one question as a list; one that is given alone is a list of one.

    Args:
        images: a picture as :func:`load_image` takes it, a video, or an iterable of them.

    Raises:
        RuntimeRefusal: naming the type that is none of these.
    """
    if _is_picture(images):
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, dict | np.ndarray):
        raise RuntimeRefusal(f"pictures are given as {_kind(images)}; {TAKEN}, a Video, or a list of them")
    found = list(images)
    for number, picture in enumerate(found, 1):
        if not _is_picture(picture):
            raise RuntimeRefusal(f"picture {number} is given as {_kind(picture)}; {TAKEN}, or a Video")
    return found


def _is_picture(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3)
    kinds = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | Video
    return isinstance(value, kinds) or hasattr(value, "read")


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.ndim} dimensions"
    return "None" if value is None else type(value).__name__


def _files(name: str | Path) -> list[Path]:
    """The files that a path of a video stands for."""
    path = Path(name)
    try:
        return sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise RuntimeRefusal(f"the folder {path} cannot be read ({error.strerror}); give one with frames") from error
