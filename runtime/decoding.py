"""An opened picture -> upright 8-bit RGB, and what a JPEG file may cost: what Pillow leaves to its callers."""

from __future__ import annotations

import re
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from vlmtrim.runtime.errors import RuntimeRefusal

# A progressive JPEG file is decoded once for every scan, and a scan may have less than a hundred bytes: without a limit
# 1 MB keeps a processor busy for a quarter of an hour. Encoders write 1 to 12, and a script of every step about 40.
MOST_SCANS = 64
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")  # of those that have a length, and the end; not in pixels
_START_OF_SCAN, _END = 0xDA, 0xD9

_PHOTOMETRIC, _BITS = 262, 258  # tags of TIFF
_EIGHT_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 16-bit grey -> 8-bit, rounded
_STRIP = 512  # rows that are laid on white at once, so that no second picture is in memory
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_scans(stream: BinaryIO, name: str) -> None:
    """Raise RuntimeRefusal where a JPEG file has more scans than MOST_SCANS."""
    stream.seek(0)
    data = stream.read()
    place = scans = 0
    while (marker := _MARKER.search(data, place)) is not None and marker[1][0] != _END:
        scans += marker[1][0] == _START_OF_SCAN
        if scans > MOST_SCANS:
            raise RuntimeRefusal(f"{name} is a JPEG of more than {MOST_SCANS} scans; save it again")
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """The pixels of a picture as RGB, turned as its EXIF says. Raises RuntimeRefusal, and whatever Pillow raises."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    image = _eight_bit(image, name)
    if turn is not None:
        image = image.transpose(turn)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of a turn; 1, none, where the EXIF data are damaged: the pixels need not be."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever Pillow raises
        return 1


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bit scaled to them, which Pillow's ``convert`` would clip; every other picture as it is."""
    if image.mode != "F" and image.mode != "I" and not image.mode.startswith("I;"):
        return image
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == 0 or tags.get(_BITS) == (12,):
        raise RuntimeRefusal(f"{name} holds grey of 12 bit, or of more than 8 with 0 for white; save it with 8 bit")
    values = np.asarray(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():  # also where one is NaN
            raise RuntimeRefusal(f"{name} holds floating-point values outside 0 to 1; scale them to it, or save 8 bit")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise RuntimeRefusal(f"{name} holds integers outside 16 bit (0 to 65535); scale them to it, or save 8 bit")
    return Image.fromarray(_EIGHT_BIT[values])


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparent parts on white, as transformers' image processors lay it."""
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        whole.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole
