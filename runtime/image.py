"""Picture file -> pixel values, as the checkpoint's Hugging Face image processor makes them, with Pillow and numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmtrim.runtime.errors import RuntimeRefusal

# A file may unpack to this many pixels (64 M = 192 MB of RGB); a decompression bomb asks for far more.
MAX_PIXELS = 64 * 1024 * 1024


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Open a picture as RGB, turned upright. Raises RuntimeRefusal: missing, no picture, truncated, too large."""
    if isinstance(source, Image.Image):
        return _checked_rgb(source, "the picture")
    path = Path(source)
    if not path.is_file():
        raise RuntimeRefusal(f"no picture at {path}; give the path of an image file")
    previous, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit, checked before decoding
    try:
        with Image.open(path) as image:
            return _checked_rgb(image, str(path))
    except UnidentifiedImageError as error:
        raise RuntimeRefusal(f"{path} is no picture that Pillow can read; give a PNG, JPEG, WebP, ...") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RuntimeRefusal(f"{path} is damaged or truncated ({error}); give an intact picture") from error
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def _checked_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RuntimeRefusal(
            f"{name} has {width} x {height} pixels, the limit is {MAX_PIXELS // 1_000_000} million; scale it down first"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def generated_picture(seed: int) -> Image.Image:
    """A picture with structure at every scale: gradients, rectangles and noise; equal for equal seeds."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, 240)
    pixels = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:200, None], (1, 240)), np.full((200, 240), 96.0)], -1)
    for _ in range(12):
        top, left = random.integers(0, 160), random.integers(0, 200)
        pixels[top : top + 40, left : left + 40] = random.integers(0, 255, 3)
    pixels += random.normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _as_dict(size: Any, *keys: str) -> dict[str, int]:
    """Old settings hold a plain number where newer ones hold named sides."""
    return dict.fromkeys(keys, size) if isinstance(size, int) else dict(size or {})


def image_settings(folder: Path) -> dict[str, Any]:
    """``preprocessor_config.json``, or the ``image_processor`` part of ``processor_config.json``."""
    raw: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            raw = content.get("image_processor", raw) if name.startswith("processor") else content
    if not raw:
        raise RuntimeRefusal(f"{folder} has no image-processor settings (preprocessor_config.json)")
    return raw


def normalised(
    pixels: np.ndarray, scale: float | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> np.ndarray:
    """uint8 [height, width, 3] -> float32 [3, height, width], by transformers' steps; None leaves one out."""
    values = pixels.astype(np.float64) * scale if scale is not None else pixels
    values = values.astype(np.float32).transpose(2, 0, 1)
    if mean is None or std is None:
        return np.ascontiguousarray(values)
    means, deviations = (np.array(v, dtype=np.float32)[:, None, None] for v in (mean, std))
    return np.ascontiguousarray((values - means) / deviations)


@dataclass(frozen=True)
class ImageProcessor:
    """The steps of transformers' CLIP, SigLIP and LLaVA image processors (Pillow backend): bit-equal results.

    Attributes:
        height, width: size after resizing and cropping.
        shortest_edge: resize so that the shorter side has this length; None resizes to (height, width).
        crop: cut (height, width) out of the middle.
        pad_to_square: fill up with the mean colour before resizing.
        resample: Pillow filter number.
        scale: factor on 0..255 values, None for no rescaling.
        mean, std: per channel; None for no normalising.
    """

    height: int
    width: int
    shortest_edge: int | None
    crop: bool
    pad_to_square: bool
    resample: int
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @staticmethod
    def from_folder(folder: Path) -> ImageProcessor:
        """Read ``preprocessor_config.json``, or the ``image_processor`` part of ``processor_config.json``."""
        raw = image_settings(folder)
        size: dict[str, int] = _as_dict(raw.get("size"), "shortest_edge")
        crop: dict[str, int] = _as_dict(raw.get("crop_size"), "height", "width")
        cropping = bool(raw.get("do_center_crop", False))
        edge = size.get("shortest_edge")
        box = crop if cropping else size
        if "height" not in box or "width" not in box:
            raise RuntimeRefusal(f"{folder}: the image-processor settings give no fixed height and width: {box}")
        normalise = raw.get("do_normalize", True)
        return ImageProcessor(
            height=int(box["height"]),
            width=int(box["width"]),
            shortest_edge=int(edge) if edge and raw.get("do_resize", True) else None,
            crop=cropping,
            pad_to_square=bool(raw.get("do_pad", False)),
            resample=int(raw.get("resample", Image.Resampling.BICUBIC)),
            scale=float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else None,
            mean=tuple(raw["image_mean"]) if normalise else None,
            std=tuple(raw["image_std"]) if normalise else None,
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture -> float32 [3, height, width]."""
        pixels = np.asarray(self.framed(image))
        return normalised(pixels, self.scale, self.mean, self.std)

    def framed(self, image: Image.Image) -> Image.Image:
        """The part of the picture that the model sees, [height, width] pixels."""
        if self.pad_to_square:
            image = self._padded(image)
        if self.shortest_edge is None:
            return image.resize((self.width, self.height), resample=self.resample)
        width, height = image.size
        short, long = min(width, height), max(width, height)
        stretched = int(self.shortest_edge * long / short)
        size = (self.shortest_edge, stretched) if width <= height else (stretched, self.shortest_edge)
        image = image.resize(size, resample=self.resample)
        if not self.crop:
            return image
        if image.width < self.width or image.height < self.height:
            raise RuntimeRefusal(
                f"the picture is {image.width} x {image.height} after resizing, smaller than the crop of "
                f"{self.width} x {self.height}; the checkpoint's image-processor settings do not fit each other"
            )
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        colour = tuple(int(channel * 255) for channel in self.mean or (0.0, 0.0, 0.0))
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
