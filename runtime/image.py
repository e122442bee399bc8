"""Pictures -> pixel values, as the checkpoint's Hugging Face image processor makes them, with Pillow and numpy.

Pictures come from strangers: named formats alone are tried, size is checked before pixels are unpacked, and whatever
Pillow raises becomes one sentence. Nothing of Pillow's own settings is changed, so threads do not meet.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.decoding import check_scans, upright_rgb
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image_settings import ImageSettings

# A file may unpack to this many pixels (64 M = 192 MB of RGB); a decompression bomb asks for far more.
MAX_PIXELS = 64 * 1024 * 1024
# A picture may have this many bytes, whether it is a file, in memory, a stream or a data: URL.
MAX_BYTES = 512 << 20
# A picture stretched to more pixels than this is stretched only where the crop keeps it.
MAX_STRETCHED = 16 * 1024 * 1024

# What is tried, whatever the file is called. Their plugins are registered by the import, once: left to itself, Pillow
# looks for plugins while it opens a file, and two threads that do so at once may find none.
_PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow warns of odd EXIF, palettes and sizes on stderr, with paths of its source. The filter is the last of all, so
# any other one goes before it; catch_warnings around a call would not do, it is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/|(?:https?|ftps?|file):", re.IGNORECASE)
_DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)

# One picture, as it may be given: path, contents of a file, open file, uint8 [H, W, 3] or [H, W], Pillow image.
Picture: TypeAlias = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Image.Image


def load_image(source: Picture, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture as RGB, turned upright.

    16-bit grey is scaled to 8 bit, floating point from 0..1; transparent parts are laid on white, as transformers'
    image processors lay them; every other mode as Pillow's ``convert("RGB")`` does it.

    Args:
        source: path or contents of a file, an open binary file, uint8 [H, W, 3] (RGB) or [H, W], or a Pillow image.
        most_pixels: that it may have, checked before they are unpacked; MAX_PIXELS at most.

    Raises:
        RuntimeRefusal: missing, no picture, truncated, too large, of values that have no range, or no such source.
    """
    if isinstance(source, Image.Image):
        with _refusing("the picture"):
            _check_size(*source.size, "the picture", most_pixels)
            return upright_rgb(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source, most_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _opened(io.BytesIO(source), "the picture", most_pixels)
    if isinstance(source, str | os.PathLike):
        with _existing(source) as stream:
            return _opened(stream, _said(source), most_pixels)
    if hasattr(source, "read"):
        return _opened(io.BytesIO(_contents(source)), _said(getattr(source, "name", "the picture")), most_pixels)
    raise RuntimeRefusal(f"a picture is given as {type(source).__name__}; {TAKEN}")


TAKEN = "give a path, bytes, an open binary file, a uint8 array [H, W, 3] or [H, W], or a Pillow image"


def picture_argument(text: str) -> str | bytes:
    """What a picture of a command line stands for: ``-`` is stdin, ``data:`` a picture itself, all else a path.

    Raises RuntimeRefusal for other URLs: nothing is fetched.
    """
    if text == "-":
        stdin = sys.stdin
        if stdin is None or stdin.isatty():
            raise RuntimeRefusal("'-' reads the picture from stdin, which is a terminal; pipe a picture in")
        data = stdin.buffer.read(MAX_BYTES + 1)
        if not data:
            raise RuntimeRefusal("'-' reads the picture from stdin, which is empty; pipe a picture in")
        return _bounded(data, "stdin")
    if text[:5].lower() != "data:":
        _refuse_url(text)
        return text
    return data_picture(text)


def data_picture(text: str, most_bytes: int | None = None) -> bytes:
    """The picture that a ``data:`` URL carries, of at most so many bytes. Raises RuntimeRefusal; nothing is fetched."""
    most_bytes = MAX_BYTES if most_bytes is None else most_bytes
    head = _DATA.match(text)
    if head is None:
        raise RuntimeRefusal(f"{_said(text[:40])} is no data: URL of a picture; expected data:image/png;base64,...")
    if len(text) > most_bytes // 3 * 4:
        raise RuntimeRefusal(f"a data: URL of {len(text)} characters; a picture has at most {most_bytes >> 20} MB")
    try:
        return base64.b64decode(
            text[head.end() :].replace("%2B", "+").replace("%2F", "/").replace("%3D", "="), validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise RuntimeRefusal("a data: URL whose contents are no base64; give it whole") from error


def _existing(source: str | os.PathLike) -> BinaryIO:
    """A regular file, opened. Raises RuntimeRefusal."""
    if isinstance(source, str):
        _refuse_url(source)
    try:
        path = Path(source)
        found = path.is_file()
    except (OSError, TypeError, ValueError):  # a name too long, a folder that may not be entered, a path of bytes
        found = False
    if not found:
        raise RuntimeRefusal(f"no picture at {_said(source)}; give the path of an image file")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise RuntimeRefusal(f"{_said(source)} cannot be read ({error.strerror}); give another picture") from error
    if os.fstat(stream.fileno()).st_size > MAX_BYTES:
        stream.close()
        raise RuntimeRefusal(f"{_said(source)} {_TOO_LONG}")
    return stream


def _refuse_url(text: str) -> None:
    if _URL.match(text):
        raise RuntimeRefusal(f"{_said(text)} is a URL; nothing is fetched here: download the picture, give its path")


def _said(name: Any) -> str:
    """A name for a message: on one line."""
    said = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else str(name)
    return said if said.isprintable() else ascii(said)


def _contents(stream: Any) -> bytes:
    """What an open file holds, from its start where it can go there."""
    try:
        if stream.seekable():
            stream.seek(0)
        data = stream.read(MAX_BYTES + 1)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise RuntimeRefusal(f"a picture is given as {type(stream).__name__}, which cannot be read; {TAKEN}") from error
    if not isinstance(data, bytes):
        raise RuntimeRefusal(f"a picture is given as {type(stream).__name__} of {type(data).__name__}; {TAKEN}")
    return _bounded(data, "the picture")


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise RuntimeRefusal(f"{name} {_TOO_LONG}")
    return data


_TOO_LONG = f"has more than {MAX_BYTES >> 20} MB; scale the picture down first"


def _from_array(array: np.ndarray, most_pixels: int) -> Image.Image:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not fits:
        raise RuntimeRefusal(f"a picture is given as an array of {array.dtype} {list(array.shape)}; {TAKEN}")
    _check_size(array.shape[1], array.shape[0], "the picture", most_pixels)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _opened(stream: BinaryIO, name: str, most_pixels: int) -> Image.Image:
    with _refusing(name), Image.open(stream, formats=FORMATS) as image:
        _check_size(*image.size, name, most_pixels)
        if image.format in ("JPEG", "MPO"):
            check_scans(stream, name)
        return upright_rgb(image, name)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever Pillow raises while it reads a picture becomes a RuntimeRefusal: a damaged file can raise anything."""
    try:
        yield
    except RuntimeRefusal:
        raise
    except UnidentifiedImageError as error:
        raise RuntimeRefusal(
            f"{name} is no picture that is read here; give a PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RuntimeRefusal(f"{name} {_TOO_LARGE}") from error
    except Exception as error:
        raise RuntimeRefusal(f"{name} is damaged, truncated or unreadable; give an intact picture") from error


_TOO_LARGE = f"has more pixels than the limit of {MAX_PIXELS // 1_000_000} million; scale it down first"


def _check_size(width: int, height: int, name: str, most: int) -> None:
    if width * height > most:
        raise RuntimeRefusal(
            f"{name} has {width} x {height} pixels, the limit is {most // 1_000_000} million; scale it down first"
        )
    if width < 1 or height < 1:
        raise RuntimeRefusal(f"{name} has {width} x {height} pixels; give one that has any")


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
    def from_folder(files: Folder) -> ImageProcessor:
        """Read ``preprocessor_config.json``, or the ``image_processor`` part of ``processor_config.json``.

        Raises BundleError where they are no settings of a picture of fixed size.
        """
        settings = ImageSettings.read(files)
        size = settings.sides("size", ("shortest_edge",))
        cropping = settings.boolean("do_center_crop", False)
        box = settings.sides("crop_size", ("height", "width")) if cropping else size
        if "height" not in box or "width" not in box:
            raise settings.refuse(f"{'crop_size' if cropping else 'size'} gives no fixed height and width: {box}")
        if not settings.boolean("do_resize", True):
            raise settings.refuse("do_resize is false; a model of fixed size needs its pictures resized")
        edge = size.get("shortest_edge")
        if edge is None and size and size != box:
            raise settings.refuse(f"size is {size}, crop_size {box}; expected a shortest_edge, or the same")
        if edge is not None and not cropping:
            raise settings.refuse("size names a shortest_edge and nothing is cropped; expected height and width")
        if edge is not None and edge < max(box["height"], box["width"]):
            raise settings.refuse(
                f"size.shortest_edge is {edge}, smaller than the crop of {box['height']} x {box['width']}"
            )
        values = settings.normalisation()
        return ImageProcessor(
            height=box["height"],
            width=box["width"],
            shortest_edge=edge,
            crop=cropping,
            pad_to_square=settings.boolean("do_pad", False),
            resample=settings.resample(),
            scale=values.scale,
            mean=values.mean,
            std=values.std,
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
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        if size[0] * size[1] > MAX_STRETCHED:
            # A long, thin picture: the same pixels, without making those that the crop leaves out.
            across, down = width / size[0], height / size[1]
            right, bottom = min((left + self.width) * across, width), min((top + self.height) * down, height)
            box = (left * across, top * down, right, bottom)
            return image.resize((self.width, self.height), resample=self.resample, box=box)
        image = image.resize(size, resample=self.resample)
        return image.crop((left, top, left + self.width, top + self.height))

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        if side * side > MAX_PIXELS:  # of a long picture the square would be far larger than the picture
            shrink = math.isqrt(MAX_PIXELS) / side
            width, height = (max(1, int(length * shrink)) for length in image.size)
            image = image.resize((width, height), resample=self.resample)
            side = max(image.size)
        colour = tuple(int(channel * 255) for channel in self.mean or (0.0, 0.0, 0.0))
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


FLOATS = ("_values", "_weights")  # how inputs of vision graphs are named that are of the contract's dtype


def expect_inputs(files: Folder, contract: Contract, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Raise BundleError where the vision graph takes other inputs than the bundle's settings make.

    Args:
        files: of the bundle.
        contract: its contract.
        shapes: of every input by name, None for a symbolic dimension; those that end in FLOATS are of the contract's
            dtype, the others int64.
    """
    made = {name: (contract.dtype if name.endswith(FLOATS) else "int64", *shape) for name, shape in shapes.items()}
    taken = {
        tensor.name: (tensor.dtype, *(None if isinstance(size, str) else size for size in tensor.shape))
        for tensor in contract.graphs["vision"].inputs
    }
    for name in sorted(made.keys() | taken.keys()):
        if made.get(name) != taken.get(name):
            raise BundleError(
                f"{files.path}: the image-processor settings make {name} of {_shape(made.get(name))}, the vision "
                f"graph takes {_shape(taken.get(name))}; take both from one checkpoint and export again"
            )


def _shape(spec: tuple[str | int | None, ...] | None) -> str:
    return "none" if spec is None else f"{spec[0]} [{', '.join('*' if v is None else str(v) for v in spec[1:])}]"
