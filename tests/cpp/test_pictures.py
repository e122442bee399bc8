"""Pictures in C++ are Pillow's, and what processors make of them the Python runtime's: every value equal."""

import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from probing import ROOT, Native, ProbeError, decoded, resized

from vlmtrim.graphs.bundle import BundleError, open_bundle, seal
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture, load_image
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.video import Video

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}
SIZES = [(240, 200), (1, 1), (3, 500), (500, 3), (336, 336), (31, 300), (1400, 1000), (84, 84), (9, 12)]


def saved(image, form, **settings):
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def assert_as_python(data):
    np.testing.assert_array_equal(decoded(data), np.asarray(load_image(data)))


@pytest.mark.parametrize("name", FILTERS)
def test_resizing_is_pillows(name):
    random = np.random.default_rng(0)
    for _ in range(60):
        width, height, wide, high = random.integers(1, 200, 4).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = Image.fromarray(pixels).resize((wide, high), FILTERS[name])
        np.testing.assert_array_equal(resized(pixels, (wide, high), FILTERS[name]), np.asarray(expected))


def test_resizing_a_part_is_pillows():
    random = np.random.default_rng(1)
    for turn in range(100):
        width, height, wide, high = random.integers(2, 300, 4).tolist()
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        left, right = np.sort(random.uniform(0, width, 2)).tolist()
        top, bottom = np.sort(random.uniform(0, height, 2)).tolist()
        box = (left, top, right + 1e-3, bottom + 1e-3)
        box = (left, top, min(box[2], width), min(box[3], height))
        resample = turn % 5
        expected = Image.fromarray(pixels).resize((wide, high), resample, box=box)
        np.testing.assert_array_equal(resized(pixels, (wide, high), resample, box), np.asarray(expected))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_pillows(mode, sampling, progressive):
    for seed, quality in enumerate((20, 75, 98)):
        image = generated_picture(seed).resize((97 + seed, 61)).convert(mode)
        settings = {} if mode == "L" else {"subsampling": sampling}
        assert_as_python(saved(image, "JPEG", quality=quality, progressive=progressive, **settings))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_as_python(saved(generated_picture(1).resize((40, 23)), form, exif=exif))


def pngs():
    random = np.random.default_rng(3)
    picture = generated_picture(5).resize((53, 37))
    alpha = Image.fromarray(random.integers(0, 256, (37, 53), dtype=np.uint8))
    wide = Image.fromarray(random.integers(0, 65536, (37, 53), dtype=np.uint16))
    yield "RGB", saved(picture, "PNG")
    yield "grey", saved(picture.convert("L"), "PNG")
    yield "one bit", saved(picture.convert("1"), "PNG")
    yield "16 bit", saved(wide, "PNG")
    with_alpha = picture.copy()
    with_alpha.putalpha(alpha)
    yield "alpha", saved(with_alpha, "PNG")
    yield "grey and alpha", saved(with_alpha.convert("LA"), "PNG")
    for bits in (1, 2, 4, 8):
        few = picture.quantize(2**bits)
        yield f"palette {bits}", saved(few, "PNG", bits=bits)
        yield f"palette {bits}, one transparent", saved(few, "PNG", bits=bits, transparency=1)
        shares = bytes(random.integers(0, 256, 2**bits, dtype=np.uint8))
        yield f"palette {bits}, shares", saved(few, "PNG", bits=bits, transparency=shares)
    flat = Image.fromarray(np.asarray(picture) // 128 * 128)
    yield "a transparent colour", saved(flat, "PNG", transparency=(128, 0, 128))
    yield "a transparent grey", saved(flat.convert("L").point(lambda v: v // 64 * 64), "PNG", transparency=64)
    yield "a transparent bit", saved(picture.convert("1"), "PNG", transparency=1)


def chunk(name, data):
    return name + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)


def animation(frames, size, transparent=False):
    """A WebP file of lossless frames, each (left, top, picture), which Pillow does not write so."""
    size = b"".join((side - 1).to_bytes(3, "little") for side in size)
    chunks = chunk(b"VP8X", bytes([0x02 | 0x10 * transparent, 0, 0, 0]) + size) + chunk(b"ANIM", bytes(6))
    for left, top, image in frames:
        numbers = (left // 2, top // 2, image.width - 1, image.height - 1, 100)
        head = b"".join(number.to_bytes(3, "little") for number in numbers) + b"\0"
        chunks += chunk(b"ANMF", head + saved(image, "WEBP", lossless=True)[12:])
    return chunk(b"RIFF", b"WEBP" + chunks)


def webps():
    random = np.random.default_rng(6)
    picture = generated_picture(7).resize((61, 43))
    clear = picture.copy()
    clear.putalpha(Image.fromarray(random.integers(0, 256, (43, 61), dtype=np.uint8)))
    for quality in (0, 40, 80, 100):
        yield f"quality {quality}", saved(picture, "WEBP", quality=quality)
        yield f"alpha, quality {quality}", saved(clear, "WEBP", quality=quality, alpha_quality=quality)
    yield "lossless", saved(picture, "WEBP", lossless=True)
    yield "lossless alpha", saved(clear, "WEBP", lossless=True)
    yield "lossless alpha, exact", saved(clear, "WEBP", lossless=True, exact=True)
    yield "few colours", saved(picture.quantize(4), "WEBP", lossless=True)
    yield "a pixel", saved(picture.resize((1, 1)), "WEBP")
    yield "wide", saved(picture.resize((700, 3)), "WEBP", quality=60)
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    yield "XMP", saved(picture, "WEBP", xmp=packet)
    exif = Image.Exif()
    exif[0x0112] = 8
    yield "EXIF with its name", saved(picture, "WEBP", exif=b"Exif\0\0" + exif.tobytes())
    yield "EXIF before XMP", saved(picture, "WEBP", exif=exif, xmp=packet)
    yield "damaged EXIF", saved(picture, "WEBP", exif=b"II*\0\xff\xff")
    yield "animated", saved(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)])
    small = [(6, 10, clear.resize((20, 12))), (0, 0, clear)]
    yield "a first frame inside", animation(small, picture.size, transparent=True)
    yield "... of an opaque animation", animation([(6, 10, picture.resize((20, 12)))], picture.size)
    yield "behind the end", saved(picture, "WEBP") + b"and more"


PNGS, WEBPS = dict(pngs()), dict(webps())


@pytest.mark.parametrize("name", WEBPS)
def test_webp_is_pillows(name):
    assert_as_python(WEBPS[name])


@pytest.mark.parametrize("name", PNGS)
def test_png_is_pillows(name):
    assert_as_python(PNGS[name])


def test_every_share_of_every_grey_is_laid_on_white_as_python_does():
    grey, share = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([grey, share], -1).astype(np.uint8), "LA")
    assert_as_python(saved(image, "PNG"))


@pytest.mark.parametrize(("form", "lossless"), [("JPEG", False), ("PNG", True), ("WEBP", False), ("WEBP", True)])
def test_damaged_files_are_refused_or_as_in_python(form, lossless):
    """Whatever is cut or changed: a sentence or a picture; where both read it, the same one."""
    data = saved(generated_picture(2).resize((64, 48)), form, **({"lossless": lossless} if form == "WEBP" else {}))
    random = np.random.default_rng(4)
    for _ in range(150):
        damaged = bytearray(data)
        if random.random() < 0.4:
            damaged = damaged[: random.integers(0, len(data))]
        for _ in range(random.integers(1, 4)):
            if damaged:
                damaged[random.integers(0, len(damaged))] = random.integers(0, 256)
        try:
            found = decoded(bytes(damaged))
        except ProbeError as refusal:
            assert "the picture" in str(refusal)
            continue
        try:
            expected = np.asarray(load_image(bytes(damaged)))
        except RuntimeRefusal:
            continue
        if found.shape == expected.shape and form != "JPEG":
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no picture that is read here"),
        (b"GIF89a" + bytes(40), "is no picture that is read here"),
        (b"\xff\xd8\xff", "is damaged"),
        (b"\x89PNG\r\n\x1a\n", "is damaged"),
        (b"RIFF\x04\0\0\0WEBP", "is damaged"),
        (b"RIFF", "is no picture that is read here; give a PNG, JPEG or WebP"),
        (saved(Image.new("1", (20000, 20000)), "PNG"), "has 20000 x 20000 pixels"),
        (animation([(0, 0, Image.new("RGB", (8, 8)))], (20000, 20000)), "has 20000 x 20000 pixels"),
    ],
    ids=["empty", "other", "jpeg", "png", "webp", "short", "bomb", "canvas"],
)
def test_what_is_no_picture_is_refused(data, said):
    with pytest.raises(ProbeError, match=said):
        decoded(data)


@pytest.mark.slow
def test_a_library_without_libwebp_says_so(tmp_path):
    source = ROOT / "runtime/cpp/src"
    (tmp_path / "main.cpp").write_text("""
        #include <iostream>
        #include "core/error.hpp"
        #include "picture/picture.hpp"
        int main(int, char** names) {
          try { vlmtrim::load_picture(names[1]); } catch (const vlmtrim::Refusal& why) { std::cout << why.what(); }
        }""")
    parts = [tmp_path / "main.cpp", *(source / f"picture/{name}.cpp" for name in ("decode", "jpeg", "png"))]
    command = ["g++", "-std=c++17", f"-I{source}", *parts, "-ljpeg", "-lpng", "-o", tmp_path / "tool"]
    subprocess.run(command, check=True)
    (tmp_path / "picture.webp").write_bytes(WEBPS["lossless"])
    done = subprocess.run([tmp_path / "tool", tmp_path / "picture.webp"], capture_output=True, text=True)
    assert "is a WebP picture, and this library was built without libwebp; give a PNG or JPEG" in done.stdout


def test_a_jpeg_of_many_scans_is_refused():
    data = saved(generated_picture(0).resize((16, 16)), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 20)]
    with pytest.raises(ProbeError, match="more than 64 scans"):
        decoded(data[:start] + scan * 70 + data[start:])


FAMILIES = {
    "llava": {},
    "llava_next": {"k": 2, "r": 0.5},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "mllama": {"images": 3, "method": "none"},
    "smolvlm": {"max_seq_len": 1024},
    "idefics3": {"max_seq_len": 1024},
    "internvl": {"max_seq_len": 1024, "image_tokens": 52},
    "llava_onevision": {},
    "qwen3_vl": {},
    "video_llava": {},
    "gemma3": {"images": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_are_pythons(family, export_tiny):
    bundle = open_bundle(export_tiny("cpp-pictures", family=family, **FAMILIES[family]))
    ours, native = load_processor(bundle.files, bundle.contract), Native(bundle.folder)
    for sizes in [[size] for size in SIZES] + [[(84, 84), (50, 40)]]:
        compare(ours, native, [generated_picture(seed).resize(size) for seed, size in enumerate(sizes)])
    native.close()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}),
        ("tokenizer_config.json", {"extra_special_tokens": {"boi_token": 7}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"eoi_token": {"content": None}}}),
    ],
    ids=["crops", "no token", "nothing"],
)
def test_settings_that_are_not_gemmas_are_refused_as_in_python(name, change, export_tiny, tmp_path):
    folder = shutil.copytree(export_tiny("cpp-pictures", family="gemma3", images=4), tmp_path / "bundle")
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    seal(folder)
    bundle = open_bundle(folder)
    with pytest.raises(BundleError) as expected:
        load_processor(bundle.files, bundle.contract)
    with pytest.raises(ProbeError) as found:
        Native(folder)
    assert str(found.value) == str(expected.value).replace("None", "null")


def compare(ours, native, images):
    expected, found = ours(images), native.process(images)
    assert found["tokens"] == list(expected.tokens)
    assert [tuple(grid) for grid in found["grids"]] == list(expected.grids)
    assert found["words"] == list(expected.words)
    assert found["inputs"].keys() == expected.inputs.keys()
    for name, value in expected.inputs.items():
        np.testing.assert_array_equal(found["inputs"][name], value, err_msg=f"{name} of {images}")
        assert found["inputs"][name].dtype == value.dtype


def film(size, count, fps, seed=0):
    return Video([generated_picture(seed + number).resize(size) for number in range(count)], fps)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava", "smolvlm", "internvl"]
)
def test_videos_are_pythons(family, export_tiny):
    bundle = open_bundle(export_tiny("cpp-pictures", family=family, **FAMILIES[family]))
    ours, native = load_processor(bundle.files, bundle.contract), Native(bundle.folder)
    still = generated_picture(9).resize((75, 40))
    for shown in (
        [film((90, 60), 4, 2.0)],
        [film((31, 300), 3, 0.3), film((84, 84), 1, 24.0, 5)],
        [still, film((50, 70), 5, 2.5)],
        [film((57, 20), 2, 1000.0), still, generated_picture(3).resize((20, 90)), film((9, 12), 7, 0.7, 2)],
    ):
        compare(ours, native, shown)
    longer = Video([still] * 600, 2.0)
    with pytest.raises(RuntimeRefusal) as expected:
        ours([longer])
    with pytest.raises(ProbeError) as found:
        native.process([longer])
    assert str(found.value) == str(expected.value)
    native.close()


SETTINGS = {  # of videos
    "qwen3_vl": [
        {"cap_pixels_per_frame": True, "size": {"shortest_edge": 4096, "longest_edge": 300_000}},
        {"size": {"shortest_edge": 100_000, "longest_edge": 200_000}, "resample": 1, "do_normalize": False},
        {"max_frames": 0},
    ],
    "smolvlm": [
        {"size": {"height": 40, "width": 91}, "resample": 2},
        {"video_sampling": {"video_size": {"longest_edge": 77}}, "do_normalize": False},
        {"size": {"shortest_edge": 40}},
        {"video_sampling": 3},
    ],
    "internvl": [{"resample": 1, "image_mean": [0.1, 0.2, 0.3]}, {"num_frames": 9999}],
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", SETTINGS)
def test_frames_follow_the_settings_of_videos(family, nested, export_tiny, tmp_path):
    """In a file of their own, or in the processor's; settings that are none are refused as in Python."""
    source = export_tiny("cpp-pictures", family=family, **FAMILIES[family])
    path = source / "video_preprocessor_config.json"
    usual = json.loads((path if path.exists() else source / "preprocessor_config.json").read_text())
    for number, change in enumerate(SETTINGS[family]):
        folder = shutil.copytree(source, tmp_path / str(number))
        (folder / path.name).unlink(missing_ok=True)
        name = "processor_config.json" if nested else path.name
        whole = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        plain = {key: value for key, value in usual.items() if key != "size" or family != "smolvlm"}
        settings = {**plain, **change}
        (folder / name).write_text(json.dumps({**whole, "video_processor": settings} if nested else settings))
        seal(folder)
        bundle = open_bundle(folder)
        try:
            ours = load_processor(bundle.files, bundle.contract)
        except BundleError as refusal:
            with pytest.raises(ProbeError) as found:
                Native(folder)
            assert str(found.value) == str(refusal)
            continue
        native = Native(folder)
        for size, count in (((90, 60), 3), ((31, 200), 5), ((20, 9), 1)):
            compare(ours, native, [film(size, count, 1.3)])
        native.close()


def test_long_videos_are_told_as_in_python(export_tiny, tmp_path):
    """Numbers, times and lengths in words."""
    folder = shutil.copytree(export_tiny("cpp-pictures", family="smolvlm", **FAMILIES["smolvlm"]), tmp_path / "bundle")
    contract = json.loads((folder / "contract.json").read_text())
    contract["dims"]["T"][1] = 4096
    (folder / "contract.json").write_text(json.dumps(contract))
    seal(folder)
    bundle = open_bundle(folder)
    ours, native = load_processor(bundle.files, bundle.contract), Native(bundle.folder)
    picture = generated_picture(0).resize((8, 8))
    for count, fps in ((1, 2.0), (25, 0.001), (121, 1.0), (700, 0.3), (1105, 24.0), (3000, 0.02)):
        compare(ours, native, [Video([picture] * count, fps)])
    native.close()


def test_a_family_that_there_is_not_is_refused(fastv_bundle, tmp_path):
    folder = shutil.copytree(fastv_bundle, tmp_path / "bundle")
    contract = json.loads((folder / "contract.json").read_text())
    (folder / "contract.json").write_text(json.dumps({**contract, "family": "abacus"}))
    seal(folder)
    with pytest.raises(ProbeError, match=r'is of family "abacus"; this vlmtrim runs gemma3, .*, video_llava'):
        Native(folder)
