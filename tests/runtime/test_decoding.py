"""What Pillow leaves to its callers: transparent and deep pixels, damaged EXIF, JPEG files of thousands of scans."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def test_transparent_parts_are_white():
    """Finding 17: a fully transparent picture was black. Taller than the strips that it is made of."""
    clear = Image.new("RGBA", (3, 1500), (10, 20, 30, 0))
    clear.paste((10, 20, 30, 255), (0, 700, 3, 701))
    loaded = np.asarray(load_image(saved(clear, "PNG")))
    assert (loaded[700] == (10, 20, 30)).all() and (np.delete(loaded, 700, axis=0) == 255).all()
    assert loaded.shape == (1500, 3, 3)


def progressive(scans: int, side: int = 64) -> bytes:
    """A grey JPEG file whose last scan, which changes nothing, is there again and again."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path):
    """A scan of 96 bytes took 0.1 s for 65 million pixels, so that 270 KB took 20 s."""
    assert load_image(progressive(64)).size == (64, 64)
    (tmp_path / "scans.jpg").write_bytes(progressive(65))
    with pytest.raises(RuntimeRefusal, match=r"scans\.jpg is a JPEG of more than 64 scans"):
        load_image(tmp_path / "scans.jpg")
    start = time.perf_counter()
    with pytest.raises(RuntimeRefusal, match="scans"):
        load_image(progressive(5000, side=8000))
    assert time.perf_counter() - start < 5


def test_only_scans_count_as_scans():
    """The bytes of a marker mean nothing inside a segment, nor behind the end, where phones keep a film."""
    data = progressive(64)
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 2000) + b"\xff\xda" * 1000
    assert load_image(data[:2] + comment + data[2:] + b"\xff\xda" * 1000).size == (64, 64)


def test_damaged_exif_does_not_keep_a_picture_from_being_seen():
    """Another tag points behind the end: turned all the same. EXIF that is no EXIF: seen as stored."""
    tags = struct.pack("<HHHII", 2, 274, 3, 1, 6) + struct.pack("<HHII", 34853, 4, 1, 9_999_999)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + bytes(4)
    stored = noise(30, 20)
    for kind in ("PNG", "WEBP"):
        loaded = load_image(saved(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
        np.testing.assert_array_equal(np.asarray(loaded), np.rot90(np.asarray(stored), -1))
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n       4\nno hexadecimal numbers")
    np.testing.assert_array_equal(np.asarray(load_image(saved(stored, "PNG", pnginfo=text))), np.asarray(stored))


def deep(values: np.ndarray, mode: str | None = None, kind: str = "PNG") -> bytes:
    """A file of grey values of more than 8 bit."""
    image = Image.fromarray(values)
    assert mode is None or image.mode == mode
    return saved(image, kind)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    """Finding 17: it was 255 everywhere."""
    loaded = load_image(deep(GREY.astype(np.uint16) * 257, "I;16", kind))
    np.testing.assert_array_equal(np.asarray(loaded), np.repeat(GREY[..., None], 3, axis=2))
    rounded = load_image(deep(np.array([[0, 128, 129, 385, 386, 65535]], np.uint16), "I;16", kind))
    assert np.asarray(rounded)[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_16_bit_grey_of_other_layouts_is_scaled():
    expected = np.repeat(GREY[..., None], 3, axis=2)
    wide = GREY.astype(np.int32) * 257
    np.testing.assert_array_equal(np.asarray(load_image(Image.fromarray(wide))), expected)  # I
    big = Image.frombytes("I;16B", (16, 16), (GREY.astype(">u2") * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load_image(big)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(deep(wide, "I", "TIFF"))), expected)


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_integers_beyond_16_bit_are_refused(values):
    with pytest.raises(RuntimeRefusal, match="outside 16 bit"):
        load_image(deep(np.array([values], np.int32), "I", "TIFF"))


def grey_tiff(bits: int, photometric: int, pixels: bytes) -> bytes:
    """One row of two pixels; Pillow writes neither 12 bit nor white as zero."""
    tags = {
        256: 2,
        257: 1,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 1,
        279: len(pixels),
    }
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def test_grey_that_pillow_does_not_scale_is_refused():
    assert np.asarray(load_image(grey_tiff(16, 1, b"\x01\x01\xff\xff")))[0, :, 0].tolist() == [1, 255]
    assert np.asarray(load_image(grey_tiff(8, 0, b"\x01\xff")))[0, :, 0].tolist() == [254, 0]
    for bits, photometric, pixels in ((12, 1, b"\xff\xff\xff"), (16, 0, b"\0\0\xff\xff")):
        with pytest.raises(RuntimeRefusal, match="save it with 8 bit"):
            load_image(grey_tiff(bits, photometric, pixels))


def test_floating_point_from_0_to_1_is_scaled():
    loaded = load_image(deep(GREY.astype(np.float32) / 255, "F", "TIFF"))
    np.testing.assert_array_equal(np.asarray(loaded), np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize("values", [[0, 1.5], [-0.1, 0], [0, np.nan], [0, np.inf], [0, 255]])
def test_floating_point_of_another_range_is_refused(values):
    with pytest.raises(RuntimeRefusal, match="outside 0 to 1"):
        load_image(deep(np.array([values], np.float32), "F", "TIFF"))
