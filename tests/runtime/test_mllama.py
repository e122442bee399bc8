"""Llama-3.2-Vision's pictures and masks, to the bit what transformers' processor makes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from vlmtrim.graphs.contract import PADDING, SEES_NOTHING, GraphSpec, TensorSpec
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.crossing import View
from vlmtrim.runtime.processors.mllama import Processor

IMAGE, TILES, FEATURES = 259, 4, 17
# Smaller than a tile, its size, wide, tall, extreme, larger than the canvas, and what rounds awkwardly.
SIZES = [
    (10, 7),
    (56, 56),
    (57, 56),
    (300, 20),
    (20, 300),
    (1, 400),
    (900, 2),
    (640, 480),
    (113, 111),
    (224, 56),
    (99, 168),
]


def settings_of(**changed):
    common = {"do_convert_rgb": True, "do_resize": True, "do_pad": True, "do_rescale": True, "rescale_factor": 1 / 255}
    mean = {"do_normalize": True, "image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276]}
    return {**common, **mean, "resample": 2, "size": {"height": 56, "width": 56}, "max_image_tiles": TILES, **changed}


def make(folder, **changed):
    raw = settings_of(**changed)
    (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    tiles, side = raw["max_image_tiles"], 56
    inputs = (
        TensorSpec("pixel_values", "float32", ("I", tiles, 3, side, side)),
        TensorSpec("aspect_ratio_ids", "int64", ("I",)),
        TensorSpec("aspect_ratio_mask", "int64", ("I", tiles)),
    )
    graphs = {"vision": GraphSpec("vision.onnx", inputs, ())}
    contract = SimpleNamespace(image_tokens=tiles * FEATURES, image_token_id=IMAGE, dtype="float32", graphs=graphs)
    return Processor(Folder(folder), contract), MllamaImageProcessorPil(**raw)


def picture(size):
    random = np.random.default_rng(size[0] * 1000 + size[1])
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "changed", [{}, {"max_image_tiles": 6, "resample": 3}, {"do_normalize": False, "do_rescale": False}]
)
def test_pictures_are_those_of_transformers(tmp_path, changed):
    ours, theirs = make(tmp_path, **changed)
    images = [picture(size) for size in SIZES]
    found, expected = ours(images), theirs([images], return_tensors="np")
    assert found.tokens == (1,) * len(images)
    for name, value in found.inputs.items():
        np.testing.assert_array_equal(value, expected[name][0], err_msg=name)
    assert found.inputs["pixel_values"].dtype == np.float32


def test_a_drawing_shows_the_canvas(tmp_path):
    ours, _ = make(tmp_path)
    assert ours.framed(picture((300, 20))).size == (224, 56)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_masks_are_those_of_transformers(tmp_path_factory, data):
    """A conversation of several steps: every token sees the tiles that transformers' mask of the whole gives it."""
    processor, _ = make(tmp_path_factory.mktemp("p"))
    steps = data.draw(
        st.lists(st.lists(st.sampled_from([5, 6, IMAGE]), min_size=1, max_size=8), min_size=1, max_size=3)
    )
    view, seen, numbers, filled = View.empty(1), [], [], []
    for ids in steps:
        sizes = data.draw(st.lists(st.integers(1, TILES), min_size=ids.count(IMAGE), max_size=ids.count(IMAGE)))
        mask = np.array([[tile < size for tile in range(TILES)] for size in sizes], dtype=np.int64)
        if sizes:
            pictures = SimpleNamespace(inputs={"aspect_ratio_mask": mask})
            numbers.append(processor.image_numbers(pictures, view)[0])
        seen.append(processor.seen_images(np.array([ids]), np.array([len(ids)]), view, bool(sizes))[0])
        filled += sizes
    whole = [token for ids in steps for token in ids]
    found_seen = np.concatenate(seen)
    if not filled:
        assert (found_seen == SEES_NOTHING).all()
        return
    tags = np.concatenate(numbers)
    found = (tags >= found_seen[:, :1]) & (tags < found_seen[:, 1:])
    spans = get_cross_attention_token_mask(whole, IMAGE)
    tiles = convert_sparse_cross_attention_mask_to_dense([spans], [filled], TILES, len(whole))[0]
    expected = tiles.reshape(len(whole), -1).repeat(FEATURES, axis=1).astype(bool)
    sees = expected.any(1)
    np.testing.assert_array_equal(found[sees], expected[sees])
    assert (found_seen[~sees] == SEES_NOTHING).all()
    np.testing.assert_array_equal(
        tags == PADDING, ~np.array([t < f for f in filled for t in range(TILES)]).repeat(FEATURES)
    )


def test_rows_that_run_along_and_generated_marks_change_nothing(tmp_path):
    processor, _ = make(tmp_path)
    view = View.empty(2)
    processor.seen_images(np.array([[IMAGE, 5], [5, 5]]), np.array([2, 2]), view, True)
    seen = processor.seen_images(np.array([[IMAGE], [IMAGE]]), np.array([1, 0]), view, False)
    assert seen.tolist() == [[[0, 1]], [list(SEES_NOTHING)]] and view.pictures.tolist() == [1, 0]
