"""Settings of a stranger's image processor: refused by file and key, or such that no picture takes much to prepare."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmtrim.graphs.bundle import seal
from vlmtrim.graphs.contract import GraphSpec, TensorSpec
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime import image as pictures
from vlmtrim.runtime import open as open_chat
from vlmtrim.runtime.image import ImageProcessor
from vlmtrim.runtime.image_settings import ImageSettings
from vlmtrim.runtime.processors import internvl, llava, llava_next, llava_onevision, mllama, qwen2_5_vl

TOWER = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
LLAVA = {
    **TOWER,
    "do_center_crop": True,
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
}
NEXT = {**LLAVA, "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}
ONEVISION = {**TOWER, "size": {"height": 56, "width": 56}, "image_grid_pinpoints": NEXT["image_grid_pinpoints"]}
MLLAMA = {**TOWER, "size": {"height": 56, "width": 56}, "max_image_tiles": 4}
INTERN = {**TOWER, "size": {"height": 56, "width": 56}, "max_patches": 4}
QWEN = {**TOWER, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 50176}
FAMILIES = {
    "internvl": (internvl, INTERN, {"pixel_values": ("T", 3, 56, 56)}),
    "llava": (llava, LLAVA, {"pixel_values": ("I", 3, 56, 56)}),
    "llava_next": (llava_next, NEXT, {"pixel_values": ("T", 3, 56, 56), "feature_index": ("M",)}),
    "llava_onevision": (
        llava_onevision,
        ONEVISION,
        {"pixel_values": ("T", 3, 56, 56), "feature_index": ("M", 4), "feature_weights": ("M", 4)},
    ),
    "mllama": (
        mllama,
        MLLAMA,
        {"pixel_values": ("I", 4, 3, 56, 56), "aspect_ratio_ids": ("I",), "aspect_ratio_mask": ("I", 4)},
    ),
    "qwen2_5_vl": (
        qwen2_5_vl,
        QWEN,
        {
            "pixel_values": ("M", 4, 1176),
            "patch_positions": ("M", 4, 2),
            "frame_ids": ("M",),
            "window_tokens": ("V", 4),
            "window_slots": ("M",),
        },
    ),
}


class FakeContract:
    """As much of a contract as a processor reads; the real ones are in the tests of each family."""

    def __init__(self, shapes, tokens):
        dtypes = {name: "float16" if name.endswith(pictures.FLOATS) else "int64" for name in shapes}
        inputs = tuple(TensorSpec(name, dtypes[name], shape) for name, shape in shapes.items())
        self.graphs = {"vision": GraphSpec("vision.onnx", inputs, ())}
        self.dtype, self.image_grid, self.image_tokens, self.image_token_id = "float16", (4, 4), tokens, 5
        self.dims = {"T": (0, 20)}


TOKENS = {
    "internvl": 5 * 16,
    "llava": 16,
    "llava_next": 16 + 8 * 9,
    "llava_onevision": 16 + 8 * 9,
    "mllama": 4 * 17,
    "qwen2_5_vl": 64,
}


def make(folder, family, settings=None, shapes=None, config=None, name="preprocessor_config.json"):
    module, common, expected = FAMILIES[family]
    (folder / name).write_text(settings if isinstance(settings, str) else json.dumps({**common, **(settings or {})}))
    (folder / "config.json").write_text(json.dumps(config or {"vision_config": {"tokens_per_second": 2}}))
    return module.Processor(Folder(folder), FakeContract(expected if shapes is None else shapes, TOKENS[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_settings_that_are_changed_below_are_good(tmp_path, family):
    made = make(tmp_path, family)([Image.new("RGB", (80, 60), "red")])
    assert made.inputs.keys() == FAMILIES[family][2].keys()
    for name, shape in FAMILIES[family][2].items():
        assert made.inputs[name].shape[1:] == shape[1:] and np.isfinite(made.inputs[name]).all()


ANY = [
    ("image_std", [0, 1, 1]),
    ("image_std", [1, 1, float("nan")]),
    ("image_std", [1, -1, 1]),
    ("image_std", [1, 1]),
    ("image_std", "x"),
    ("image_std", None),
    ("image_mean", [float("nan"), 0, 0]),
    ("image_mean", [float("inf"), 0, 0]),
    ("image_mean", [1e300, 0, 0]),
    ("image_mean", [[0], 0, 0]),
    ("image_mean", {"a": 1}),
    ("resample", 6),
    ("resample", -1),
    ("resample", "bicubic"),
    ("resample", 3.5),
    ("rescale_factor", 0),
    ("rescale_factor", 1e300),
    ("rescale_factor", "1"),
    ("do_rescale", "yes"),
    ("do_normalize", 1),
]
FIXED = [
    ("size", {"shortest_edge": 20000}),
    ("size", {"shortest_edge": 0}),
    ("size", {"shortest_edge": "56"}),
    ("size", {"shortest_edge": True}),
    ("size", {"shortest_edge": 55}),
    ("size", {"height": 57, "width": 56}),
    ("size", -3),
    ("size", [56, 56]),
    ("crop_size", {"height": 20000, "width": 56}),
    ("crop_size", {"height": 56}),
    ("crop_size", 10**400),
    ("do_center_crop", "true"),
    ("do_center_crop", False),
    ("do_resize", False),
    ("do_pad", 7),
]
POINTS = [5, [5], [[56]], [[56, 0]], [[56, 1 << 40]], [[56, 112]] * 1000, [[57, 112]]]
TILED = [("image_grid_pinpoints", value) for value in POINTS]
OF_FAMILY = {
    "internvl": [
        ("size", {}),
        ("size", {"height": 56}),
        ("size", {"height": 20000, "width": 56}),
        ("do_resize", False),
        ("max_patches", 0),
        ("max_patches", 5),
        ("max_patches", 10**9),
        ("max_patches", 4.0),
        ("min_patches", -1),
        ("min_patches", "1"),
    ],
    "llava": FIXED,
    "llava_next": [*FIXED, *TILED],
    "llava_onevision": [*TILED, ("size", {"height": 56}), ("size", {"shortest_edge": 56}), ("do_resize", False)],
    "mllama": [
        ("size", {}),
        ("size", {"height": 56}),
        ("size", {"height": 56, "width": 28}),
        ("size", {"height": -56, "width": -56}),
        ("max_image_tiles", None),
        ("max_image_tiles", 0),
        ("max_image_tiles", 10**9),
        ("max_image_tiles", 4.0),
    ],
    "qwen2_5_vl": [
        ("patch_size", 0),
        ("patch_size", 1 << 30),
        ("merge_size", -2),
        ("merge_size", 17),
        ("temporal_patch_size", "2"),
        ("temporal_patch_size", 0),
        ("min_pixels", 0),
        ("min_pixels", "many"),
        ("max_pixels", 1 << 60),
        ("max_pixels", -1),
        ("size", {"longest_edge": 0}),
        ("size", {"shortest_edge": []}),
    ],
}
WRONG = [(family, *change) for family, own in OF_FAMILY.items() for change in (*ANY, *own)]


@pytest.mark.parametrize(("family", "key", "value"), WRONG)
def test_a_wrong_setting_is_refused_by_file_and_key(tmp_path, family, key, value):
    """Findings 5, 9 and 15."""
    with pytest.raises(BundleError) as caught:
        make(tmp_path, family, {key: value})
    said = str(caught.value)
    assert "preprocessor_config.json" in said and "\n" not in said and len(said) < 600
    also = {"do_center_crop": "size", "size": "crop_size"}.get(key, key)  # of two that do not fit each other
    assert key in said or also in said or "no number of JSON" in said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"a": NaN}', '{"a": ' * 2000 + "1" + "}" * 2000, "\ud800", '{"size": 1e999}', "{}"],
)
def test_a_file_that_is_no_object_of_settings_is_refused_by_name(tmp_path, family, text):
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    module, _, shapes = FAMILIES[family]
    with pytest.raises(BundleError, match=r"preprocessor_config\.json"):
        module.Processor(Folder(tmp_path), FakeContract(shapes, TOKENS[family]))


@pytest.mark.parametrize("inner", [5, [], "x"])
def test_the_part_of_the_processor_config_must_be_an_object(tmp_path, inner):
    with pytest.raises(BundleError, match=r"processor_config\.json"):
        make(tmp_path, "llava", json.dumps({"image_processor": inner}), name="processor_config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"a": 1},
        {"vision_config": 5},
        {"vision_config": {"tokens_per_second": "2"}},
        {"vision_config": {"tokens_per_second": 0}},
        {"vision_config": {"tokens_per_second": 1e300}},
    ],
)
def test_a_wrong_model_config_is_refused_by_name(tmp_path, config):
    with pytest.raises(BundleError, match=r"config\.json: vision_config"):
        make(tmp_path, "qwen2_5_vl", config=config)


def test_settings_that_nothing_lists_are_not_read(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LLAVA))
    with pytest.raises(BundleError, match="has no image-processor settings"):
        ImageProcessor.from_folder(Folder(tmp_path, ["contract.json"]))


CHANGES = {
    "internvl": {"pixel_values": ("T", 3, 56, 55)},
    "llava": {"pixel_values": ("I", 3, 56, 55)},
    "llava_next": {"pixel_values": ("T", 1, 56, 56)},
    "llava_onevision": {"pixel_values": ("T", 1, 56, 56)},
    "mllama": {"aspect_ratio_mask": ("I", 5)},
    "qwen2_5_vl": {"pixel_values": ("M", 4, 1177)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_do_not_make_what_the_vision_graph_takes_are_refused(tmp_path, family):
    """Finding 9: before a picture is opened."""
    shapes = FAMILIES[family][2]
    (name, _), *_ = CHANGES[family].items()
    without = {key: shape for key, shape in shapes.items() if key != name}
    for changed in ({**shapes, **CHANGES[family]}, without, {**shapes, "more": ("I",)}, {**shapes, name: ()}):
        with pytest.raises(BundleError, match=r"make (\w+) of .*, the vision graph takes"):
            make(tmp_path, family, shapes=changed)


def test_a_bundle_with_such_settings_is_refused_when_it_is_opened(fastv_bundle, tmp_path):
    for path in fastv_bundle.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_std": [0, 1, 1]}))
    seal(tmp_path)
    with pytest.raises(BundleError, match=r"preprocessor_config\.json: image_std\[0\] is 0; expected"):
        open_chat(tmp_path)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(9, 700), (700, 9), (50, 333), (333, 50), (1, 400), (401, 3)])
@pytest.mark.parametrize("edge", [56, 61])
def test_what_the_crop_keeps_of_a_long_picture_is_what_transformers_keeps(tmp_path, monkeypatch, size, edge):
    """Finding 8: the part is resized alone. Of 255 levels it differs by less than one on average; more only where the
    filter overshoots, as Pillow clips between the two directions and takes them in an order that depends on the size.
    """
    monkeypatch.setattr(pictures, "MAX_STRETCHED", 1)
    raw = {**LLAVA, "size": {"shortest_edge": edge}, "do_normalize": False, "do_rescale": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    found = ImageProcessor.from_folder(Folder(tmp_path))(noise(*size))
    expected = CLIPImageProcessorPil(**raw)(noise(*size), return_tensors="np")["pixel_values"][0]
    assert found.shape == expected.shape == (3, 56, 56) and found.std() > 5
    difference = np.abs(found - expected.astype(np.float32))
    assert difference.mean() < 0.6 and difference.max() < 40


@pytest.mark.parametrize("size", [(9, 700), (700, 9), (300, 200)])
def test_a_long_picture_in_a_square_is_what_transformers_makes(tmp_path, monkeypatch, size):
    """Shrunk before it is padded, so the same within what shrinking twice changes."""
    raw = {**LLAVA, "do_pad": True, "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    expected = LlavaImageProcessorPil(**raw)(image, return_tensors="np")["pixel_values"][0].astype(np.float32)
    processor = ImageProcessor.from_folder(Folder(tmp_path))
    np.testing.assert_array_equal(processor(image), expected)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 112 * 112)
    shrunk = processor(image)
    assert shrunk.shape == expected.shape and np.abs(shrunk - expected).mean() < 3 / 255


LONG = """
import resource, sys, time
from PIL import Image
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.errors import RuntimeRefusal
bundle = open_bundle(sys.argv[1])
processor = load_processor(bundle.files, bundle.contract)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
said = []
for size in ((1, 65000), (65000, 1)):
    try:
        said.append(sorted(processor([Image.new("RGB", size, "red")]).inputs))
    except RuntimeRefusal as refusal:
        said.append(str(refusal))
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, said, sep="|")
"""


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama", "qwen2_5_vl"])
def test_the_longest_pictures_take_little_time_and_memory(export_tiny, family):
    """Finding 8: 28 s and 2.8 GB for one."""
    chosen = {"method": "none"} if family == "mllama" else {}
    bundle = export_tiny("long", family=family, **chosen)
    done = subprocess.run([sys.executable, "-c", LONG, str(bundle)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, kilobytes, said = done.stdout.split("|")
    assert float(seconds) < 5 and int(kilobytes) < 200_000, done.stdout
    assert ("up to 200 times" in said) == family.startswith("qwen")


def test_settings_of_videos_are_found_where_transformers_finds_them(tmp_path):
    """BaseVideoProcessor.get_video_processor_dict: part of the processor's, a file of their own, those of pictures."""
    (tmp_path / "preprocessor_config.json").write_text('{"fps": 1}')
    assert ImageSettings.of_videos(Folder(tmp_path)).integer("fps", 0, 9) == 1
    (tmp_path / "video_preprocessor_config.json").write_text('{"fps": 2, "part": {"fps": 4}}')
    (tmp_path / "processor_config.json").write_text("{}")
    found = ImageSettings.of_videos(Folder(tmp_path))
    assert found.integer("fps", 0, 9) == 2 and found.part("none").integer("fps", 0, 9, 7) == 7
    with pytest.raises(BundleError, match=r"video_preprocessor_config\.json: part: fps is 4"):
        found.part("part").integer("fps", 0, 3)
    with pytest.raises(BundleError, match="fps is 2; expected an object"):
        found.part("fps")
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"fps": 3}}')
    assert ImageSettings.of_videos(Folder(tmp_path)).integer("fps", 0, 9) == 3
    (tmp_path / "processor_config.json").write_text('{"video_processor": 3}')
    with pytest.raises(BundleError, match=r"processor_config\.json: video_processor is 3; expected an object"):
        ImageSettings.of_videos(Folder(tmp_path))
