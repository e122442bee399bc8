"""image.py is bit-equal to transformers' image processors (Pillow backend), and refuses what is no picture."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import ImageProcessor, load_image

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3}
CROPPED = {
    **COMMON,
    "do_convert_rgb": True,
    "size": {"shortest_edge": 56},
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 56},
    "image_mean": MEAN,
    "image_std": STD,
}
SETTINGS = {
    "clip": {**CROPPED, "image_processor_type": "CLIPImageProcessor"},
    "clip-odd-crop": {**CROPPED, "size": {"shortest_edge": 57}, "crop_size": {"height": 50, "width": 41}},
    "siglip": {
        **COMMON,
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 56, "width": 42},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "llava": {**CROPPED, "image_processor_type": "LlavaImageProcessor", "do_pad": False},
    "llava-pad": {**CROPPED, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
}


def reference(name: str):
    kind = SETTINGS[name].get("image_processor_type", "CLIPImageProcessor")
    if kind == "CLIPImageProcessor":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    elif kind == "SiglipImageProcessor":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor
    else:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor
    return Processor(**{k: v for k, v in SETTINGS[name].items() if k != "image_processor_type"})


@pytest.fixture(scope="module", params=sorted(SETTINGS))
def pair(request, tmp_path_factory):
    """(our processor, transformers' processor) of the same settings file."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS[request.param]))
    return ImageProcessor.from_folder(Folder(folder)), reference(request.param)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    image = Image.fromarray((noise // 2 + ramp // 2).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def check_equal(pair, image: Image.Image) -> None:
    ours, theirs = pair
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    got = ours(image)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_array_equal(got, np.asarray(expected, dtype=np.float32))


@pytest.mark.parametrize("size", [(56, 56), (100, 60), (60, 100), (57, 56), (31, 47), (300, 57), (9, 200), (1, 1)])
def test_pixels_are_bit_equal_at_many_sizes(pair, size):
    check_equal(pair, picture(*size))


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(width=st.integers(2, 160), height=st.integers(2, 160), seed=st.integers(0, 99))
def test_pixels_are_bit_equal_at_any_size(pair, width, height, seed):
    check_equal(pair, picture(width, height, seed=seed))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "P and alpha"])
def test_a_file_of_any_mode_is_what_transformers_makes_of_it(pair, mode, tmp_path):
    """Transparent parts are laid on white, as by ``processor(images=Image.open(path))``."""
    path = tmp_path / "picture.png"
    alpha = {"transparency": bytes(range(256))} if mode == "P and alpha" else {}
    picture(80, 64, "RGBA").convert(mode.split()[0]).save(path, **alpha)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    ours, theirs = pair
    with Image.open(path) as image:
        expected = theirs(image, do_convert_rgb=True, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours(loaded), np.asarray(expected, dtype=np.float32))


def test_old_settings_with_plain_numbers_mean_the_same(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CROPPED, "size": 56, "crop_size": 56}))
    image = picture(90, 70)
    expected = reference("clip")(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ImageProcessor.from_folder(Folder(tmp_path))(image), expected)


def test_settings_inside_the_processor_config_are_found(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": CROPPED}))
    assert ImageProcessor.from_folder(Folder(tmp_path)).shortest_edge == 56


def test_a_folder_without_settings_is_refused_by_name(tmp_path):
    with pytest.raises(BundleError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_folder(Folder(tmp_path))


def test_settings_without_a_fixed_size_are_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CROPPED, "do_center_crop": False}))
    with pytest.raises(BundleError, match="height and width"):
        ImageProcessor.from_folder(Folder(tmp_path))


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(RuntimeRefusal, match=r"nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(RuntimeRefusal):
        load_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8"])
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(RuntimeRefusal, match=r"notes\.png") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_truncated_picture_is_refused_by_name(tmp_path, suffix, share):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    picture(120, 90).save(whole)
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RuntimeRefusal, match=rf"cut\.{suffix}") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body)
    with pytest.raises(RuntimeRefusal, match="limit") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_pillows_own_limit_is_restored_after_success_and_refusal(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    picture(4, 4).save(tmp_path / "ok.png")
    load_image(tmp_path / "ok.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(RuntimeRefusal):
        load_image(tmp_path / "bad.png")
    assert before == Image.MAX_IMAGE_PIXELS


# orientation -> what makes the stored pixels upright (EXIF 2.3, table of tag 274)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("as_file", [True, False])
def test_exif_rotation_is_honoured(tmp_path, orientation, as_file):
    path: Path = tmp_path / "turned.png"
    stored = picture(30, 20)
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(path, exif=exif)
    with Image.open(path) as opened:
        loaded = load_image(path) if as_file else load_image(opened)
    np.testing.assert_array_equal(np.asarray(loaded), UPRIGHT[orientation](np.asarray(stored)))
