"""SmolVLM's pictures: tiles bit-equal with transformers' image processors, the words between them, at any size."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import SmolVLMConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from vlmtrim.export.families import smolvlm
from vlmtrim.export.job import Job
from vlmtrim.export.job_contract import build_contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.smolvlm import Processor

REAL = SmolVLMConfig(**smolvlm.published("smolvlm2-256m"))  # tiles of 512 pixels, up to 2048
FILE = "preprocessor_config.json"


def make(config, folder, max_seq_len=1024, **changes):
    smolvlm.write_tiny_processor(folder, config)
    contract = build_contract(Job("", "", max_seq_len=max_seq_len), smolvlm, config, torch.float32, folder)
    (folder / FILE).write_text(json.dumps({**json.loads((folder / FILE).read_text()), **changes}))
    return Processor(Folder(folder), contract)


def both(folder, kind=SmolVLMImageProcessorPil, **changes):
    """(our processor, transformers') with tiles of 56 pixels."""
    ours = make(smolvlm.tiny_config(), folder, **changes)
    raw = json.loads((folder / FILE).read_text())
    return ours, kind(**{name: value for name, value in raw.items() if name != "image_processor_type"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return both(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make(REAL, tmp_path_factory.mktemp("real"), max_seq_len=8192)


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray((noise // 2 + ramp // 2).astype(np.uint8))


def check(pair, *pictures):
    """Tiles, tokens and words, against what transformers makes of the pictures one by one."""
    ours, theirs = pair
    found = ours(pictures)
    made = [theirs([image], return_tensors="np", return_row_col_info=True) for image in pictures]
    expected = np.concatenate([one["pixel_values"][0] for one in made]).astype(np.float32)
    assert found.inputs["pixel_values"].dtype == np.float32
    np.testing.assert_array_equal(found.inputs["pixel_values"], expected)
    assert found.tokens == tuple(4 * one["pixel_values"].shape[1] for one in made)
    marks = "<fake_token_around_image>", "<image>", "<global-img>"
    told = [get_image_prompt_string(one["rows"][0][0], one["cols"][0][0], 4, *marks) for one in made]
    assert found.words == tuple(told)
    assert [words.count("<image>") for words in told] == list(found.tokens)


@pytest.mark.parametrize(
    "size",
    [(168, 168), (168, 56), (56, 168), (57, 55), (640, 480), (480, 640), (500, 100), (100, 499), (31, 47), (8, 300),
     (300, 8), (1, 1), (1, 1000), (1000, 1), (17, 9), (1500, 1100)],
)  # fmt: skip
def test_tiles_are_bit_equal_at_many_sizes(tiny, size):
    check(tiny, picture(*size))


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99))
def test_tiles_are_bit_equal_at_any_size(tiny, width, height, seed):
    check(tiny, picture(width, height, seed), picture(height, width, seed + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"do_image_splitting": False},
        {"size": {"longest_edge": 56}},
        {"size": {"longest_edge": 50}, "resample": 3},
        {"size": {"longest_edge": 131}, "do_normalize": False},
        {"size": {"longest_edge": 224}},
    ],
)
def test_other_settings_make_what_transformers_makes(changes, tmp_path):
    """One tile, or tiles that the longest edge does not fill."""
    pair = both(tmp_path, Idefics3ImageProcessorPil, **changes)
    check(pair, picture(100, 73), picture(20, 90, 1), picture(64, 64, 2))


@settings(deadline=None, max_examples=100)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_published_settings_make_as_many_tiles_as_transformers_counts(real, width, height):
    counter = SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    tiles, rows, columns = counter.get_number_of_image_patches(height, width)
    grid = real._tiled(real.framed(Image.new("RGB", (width, height))))
    assert grid == (rows, columns) and 5 <= tiles == rows * columns + 1 <= 17


def test_the_contract_holds_the_largest_picture(real):
    """SmolVLM2-256M: 16 tiles and the squeezed one, of 64 tokens each; of wide ones twice as many fit."""
    contract = real.contract
    assert contract.image_tokens == 17 * 64 and contract.image_grid == (8, 8) and contract.max_images == 7
    assert contract.dims["T"] == (1, 2 * 7 * 17)
    found = real([Image.new("RGB", (50, 50))])
    assert found.inputs["pixel_values"].shape == (17, 3, 512, 512) and found.tokens == (1088,)


def test_more_tiles_than_the_bundle_takes_are_refused(tiny):
    ours, _ = tiny
    most = ours.contract.dims["T"][1]
    with pytest.raises(RuntimeRefusal, match=rf"the bundle takes {most} in one step"):
        ours([picture(60, 60)] * (most // 10 + 1))


def test_views_say_where_every_token_lies(tiny):
    """All tokens of both pictures once; what lies under a token is what the model saw there."""
    ours, _ = tiny
    pictures = [picture(150, 60), picture(50, 110, 1)]
    views, tiles = ours.views(pictures), ours(pictures).inputs["pixel_values"]
    assert [view.tokens.shape for view in views] == [(4, 6), (2, 2), (6, 4), (2, 2)]
    assert sorted(np.concatenate([view.tokens.ravel() for view in views])) == list(range(4 * len(tiles)))
    for view in views:
        for (row, column), token in np.ndenumerate(view.tokens):
            tile, place = divmod(int(token), 4)
            y, x = place // 2 * 28, place % 2 * 28
            shown = np.asarray(view.image.crop((column * 28, row * 28, column * 28 + 28, row * 28 + 28)))
            seen = (tiles[tile, :, y : y + 28, x : x + 28] * 0.5 + 0.5) * 255
            np.testing.assert_allclose(shown, seen.transpose(1, 2, 0), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": {"longest_edge": 281}}, r"longest_edge 281 makes 37 tiles of 56 pixels, the bundle takes 17"),
        ({"size": {"height": 56, "width": 56}}, "expected a longest_edge in both"),
        ({"size": 56}, "expected a longest_edge in both"),
        ({"size": None}, r"longest_edge 1456 makes 677 tiles"),
        ({"max_image_size": {"longest_edge": 28}}, r"make pixel_values .*28, 28\], the vision graph takes .*56, 56\]"),
        ({"max_image_size": {"longest_edge": 0}}, "longest_edge"),
        ({"do_resize": False}, "do_resize is false"),
        ({"do_image_splitting": "yes"}, "do_image_splitting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said, tmp_path):
    with pytest.raises(BundleError, match=said):
        make(smolvlm.tiny_config(), tmp_path, **changes)
