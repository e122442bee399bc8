"""A video as a model sees it: frames at equal distances in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Video:
    """Frames in order, of one size.

    Attributes:
        frames: image files or Pillow images, at least one.
        fps: frames a second, as they are given here (of a film, those that were taken out of it).
    """

    frames: Sequence[Picture]
    fps: float = 2.0

    @staticmethod
    def of(paths: Sequence[str | Path], fps: float) -> Video:
        """A video of the files in the order given; folders stand for their files by name."""
        files = [sorted(path.iterdir()) if (path := Path(name)).is_dir() else [path] for name in paths]
        return Video([file for group in files for file in group], fps)

    def load(self) -> Video:
        """The same with every frame opened as RGB. Raises RuntimeRefusal where they cannot be one video."""
        if not self.frames:
            raise RuntimeRefusal("a video without frames; give at least one")
        if not self.fps > 0:
            raise RuntimeRefusal(f"a video of {self.fps} frames a second; give a number above 0")
        frames = tuple(load_image(frame) for frame in self.frames)
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise RuntimeRefusal(f"the frames of a video have {len(sizes)} sizes, among them {sorted(sizes)[:2]}")
        return Video(frames, float(self.fps))


def as_pictures(images: Any) -> list[Any]:
    """One picture or video, or a sequence of them, as a list. Raises RuntimeRefusal for what is neither."""
    if isinstance(images, str | bytes | Path | Image.Image | Video | np.ndarray) or hasattr(images, "read"):
        return [images]
    if not isinstance(images, Iterable):
        raise RuntimeRefusal(f"images are of type {type(images).__name__}; give a picture, or a list of pictures")
    return list(images)


def load_picture(source: Picture | Video) -> Image.Image | Video:
    """Open a picture, or every frame of a video. Raises RuntimeRefusal."""
    return source.load() if isinstance(source, Video) else load_image(source)
