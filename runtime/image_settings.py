"""The settings of a checkpoint's image processor, read from a bundle: every value by type and range, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmtrim.graphs.reading import BundleError, Folder, boolean, integer, number, shown

FILES = ("preprocessor_config.json", "processor_config.json")  # the first that has settings counts
VIDEO_FILE = "video_preprocessor_config.json"
LONGEST_EDGE = 4096  # pixels of what a model sees; towers take 224 to 1120
MOST_PIXELS = 2**31 - 1
LARGEST_PATCH = 256
MOST_TOGETHER = 16  # patches merged along a side, frames in a token
LANCZOS, BILINEAR, BICUBIC, HAMMING = 1, 2, 3, 5  # numbers of Pillow's filters, from 0 to HAMMING
# Factors and colours that no checkpoint comes near; within them every pixel value is finite in float32.
SMALLEST, LARGEST = 1e-5, 1e5


@dataclass(frozen=True)
class Normalisation:
    """``scale`` on 0..255 values, then ``mean`` and ``std`` per channel; None leaves one out."""

    scale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


class ImageSettings:
    """One JSON object of settings; a value that is null counts as missing.

    Args:
        raw: the object.
        where: its file, for messages.
    """

    def __init__(self, raw: dict[str, Any], where: str):
        self.where = where
        self._raw = {key: value for key, value in raw.items() if value is not None}

    @staticmethod
    def read(files: Folder) -> ImageSettings:
        """``preprocessor_config.json``, or the ``image_processor`` part of ``processor_config.json``.

        Raises BundleError.
        """
        for name in FILES:
            if name not in files:
                continue
            raw: Any = files.json(name)
            where = str(files.path / name)
            if name == "processor_config.json":
                raw, where = raw.get("image_processor") or {}, f"{where}: image_processor"
            if not isinstance(raw, dict):
                raise BundleError(f"{where} is {shown(raw)}; expected an object")
            if raw:
                return ImageSettings(raw, where)
        raise BundleError(f"{files.path} has no image-processor settings ({FILES[0]}); export the model again")

    @staticmethod
    def of_videos(files: Folder) -> ImageSettings:
        """As transformers finds them: the ``video_processor`` part of ``processor_config.json``, else
        ``video_preprocessor_config.json``, else those of pictures. Raises BundleError.
        """
        nested = files.json(FILES[1]).get("video_processor") if FILES[1] in files else None
        where = f"{files.path / FILES[1]}: video_processor"
        if nested is None and VIDEO_FILE in files:
            nested, where = files.json(VIDEO_FILE), str(files.path / VIDEO_FILE)
        if nested is None:
            return ImageSettings.read(files)
        if not isinstance(nested, dict):
            raise BundleError(f"{where} is {shown(nested)}; expected an object")
        return ImageSettings(nested, where)

    def part(self, key: str) -> ImageSettings:
        """Settings inside these; none where there are none. Raises BundleError."""
        value = self._raw.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(f"{key} is {shown(value)}; expected an object")
        return ImageSettings(value, f"{self.where}: {key}")

    def refuse(self, problem: str) -> BundleError:
        """To raise: what is wrong in the settings."""
        return BundleError(f"{self.where}: {problem}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer; ``default`` where there is none. Raises BundleError."""
        return integer(self._raw.get(key, default), f"{self.where}: {key}", low, high)

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """A finite number; ``default`` where there is none. Raises BundleError."""
        return number(self._raw.get(key, default), f"{self.where}: {key}", low, high)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; ``default`` where there is none. Raises BundleError."""
        return boolean(self._raw.get(key, default), f"{self.where}: {key}")

    def sides(self, key: str, plain: tuple[str, ...], most: int = LONGEST_EDGE) -> dict[str, int]:
        """Sides in pixels by name; a plain number, as in old settings, is each of ``plain``. Raises BundleError."""
        value = self._raw.get(key, {})
        if not isinstance(value, dict):
            return dict.fromkeys(plain, integer(value, f"{self.where}: {key}", 1, most))
        return {
            name: integer(side, f"{self.where}: {key}.{name}", 1, most)
            for name, side in value.items()
            if side is not None
        }

    def pairs(self, key: str, most: int) -> list[tuple[int, int]]:
        """(height, width) of each of at most ``most`` sizes; empty where there are none. Raises BundleError."""
        value = self._raw.get(key, [])
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(f"{key} is {shown(value)}; expected a list of at most {most} sizes")
        found = []
        for index, pair in enumerate(value):
            where = f"{self.where}: {key}[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise BundleError(f"{where} is {shown(pair)}; expected height and width")
            high, wide = (integer(side, where, 1, LONGEST_EDGE) for side in pair)
            found.append((high, wide))
        return found

    def resample(self, default: int = BICUBIC) -> int:
        """Number of the Pillow filter. Raises BundleError."""
        return self.integer("resample", 0, HAMMING, default)

    def normalisation(self) -> Normalisation:
        """What becomes of 0..255 values. Raises BundleError."""
        scale = None
        if self.boolean("do_rescale", True):
            scale = self.number("rescale_factor", SMALLEST, LARGEST, 1 / 255)
        if not self.boolean("do_normalize", True):
            return Normalisation(scale, None, None)
        mean, std = self._channels("image_mean", -LARGEST), self._channels("image_std", SMALLEST)
        return Normalisation(scale, mean, std)

    def _channels(self, key: str, low: float) -> tuple[float, float, float]:
        value = self._raw.get(key)
        if not isinstance(value, list) or len(value) != 3:
            raise self.refuse(f"{key} is {shown(value)}; expected a list of three numbers")
        red, green, blue = (number(v, f"{self.where}: {key}[{i}]", low, LARGEST) for i, v in enumerate(value))
        return red, green, blue
