"""InternVL's pictures: tiles and prompts bit-equal with transformers' own processor, at any size."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import InternVLConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.internvl.modeling_internvl import InternVLModel

from vlmtrim.export.families import internvl
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.job_contract import build_contract
from vlmtrim.export.oracles.reference import own_processor
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import normalised
from vlmtrim.runtime.processors.internvl import Processor, best_grid
from vlmtrim.runtime.prompt import Conversation, Prompter


def make(config: InternVLConfig, folder, **fields) -> Processor:
    config.save_pretrained(folder)
    internvl.write_tiny_processor(folder, config)
    contract = build_contract(Job("", "", None, **fields), internvl, config, torch.float32, folder)
    internvl.adapt_settings(folder, contract)
    return Processor(Folder(folder), contract)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(our processor, transformers' own) with tiles of 56 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    return make(internvl.tiny_config(), folder, max_seq_len=1024), own_processor(folder)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray((noise // 2 + ramp // 2).astype(np.uint8))


def check(pair, *pictures: Image.Image) -> None:
    """Pixels, and the words that stand for every picture."""
    ours, theirs = pair
    found = ours(pictures)
    expected = theirs(text=" and ".join(["<IMG_CONTEXT>"] * len(pictures)), images=list(pictures), return_tensors="pt")
    pixels = found.inputs["pixel_values"]
    assert pixels.dtype == np.float32 and sum(found.tokens) == 4 * len(pixels)
    np.testing.assert_array_equal(pixels, expected["pixel_values"].numpy())
    ids = theirs.tokenizer(" and ".join(found.words))["input_ids"]
    assert ids == expected["input_ids"][0].tolist() and ids.count(262) == sum(found.tokens)


@pytest.mark.parametrize(
    "size", [(56, 56), (1, 1000), (1000, 1), (17, 9), (113, 56), (240, 200), (3000, 1700), (400, 401), (7, 300)]
)
def test_tiles_and_words_are_transformers_at_many_sizes(pair, size):
    check(pair, picture(*size))


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 500), height=st.integers(1, 500), seed=st.integers(0, 99))
def test_tiles_and_words_of_two_pictures_are_transformers_at_any_size(pair, width, height, seed):
    check(pair, picture(width, height, seed), picture(height, width, seed + 1))


@settings(deadline=None, max_examples=300)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    least=st.integers(1, 6),
    most=st.integers(1, 14),
    side=st.sampled_from([56, 448]),
)
def test_the_grid_of_tiles_is_transformers(size, least, most, side):
    width, height = size
    expected = get_optimal_tiled_canvas((height, width), (side, side), least, most) if most > 1 else (1, 1)
    assert best_grid(width, height, side**2, least, most) == expected


def test_a_bundle_that_takes_fewer_tiles_says_so_in_its_settings(tmp_path):
    """Whoever prepares pictures by them, transformers included, stays below what the contract allows."""
    ours = make(internvl.tiny_config(), tmp_path, max_seq_len=512, image_tokens=23)
    raw = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (raw["max_patches"], ours.contract.image_tokens, ours.contract.dims["T"]) == (4, 23, (1, 22 * 5))
    pair = ours, own_processor(tmp_path)
    check(pair, picture(3000, 1000), picture(200, 240))
    assert ours([picture(3000, 3000)]).tokens == (5 * 4,)


@pytest.mark.parametrize("tokens", [4, 11])
def test_room_for_one_tile_or_two_means_one(tmp_path, tokens):
    """Two tiles come with a third, the whole picture."""
    ours = make(internvl.tiny_config(), tmp_path, max_seq_len=512, image_tokens=tokens)
    check((ours, own_processor(tmp_path)), picture(300, 100))
    assert ours([picture(300, 100)]).tokens == (4,) and len(ours.views([picture(300, 100)])) == 1


def test_a_published_picture_has_3328_tokens_at_most(tmp_path):
    config = InternVLConfig.from_dict(internvl.published("internvl3-1b"))
    ours = make(config, tmp_path, max_seq_len=8192)
    assert ours.contract.image_tokens == 13 * 256 and ours.contract.dims["T"] == (1, 26)
    found = ours([picture(1344, 1792), picture(30, 40)])
    assert found.tokens == (13 * 256, 13 * 256) and found.inputs["pixel_values"].shape == (26, 3, 448, 448)
    with pytest.raises(RuntimeRefusal, match=r"become 39 tiles, the bundle takes 26 .*--max-seq-len"):
        ours([picture(30, 40)] * 3)


def test_less_than_a_tile_is_refused(tmp_path):
    with pytest.raises(Refusal, match="may have 3 tokens, one tile alone has 4; give a larger --image-tokens"):
        make(internvl.tiny_config(), tmp_path, max_seq_len=512, image_tokens=3)


def test_tokens_stand_row_by_row_as_pixel_shuffle_leaves_them():
    """Of patches that are their own places: four that lie together become one, in reading order."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    made = InternVLModel.pixel_shuffle(None, torch.stack((rows, columns), -1)[None], 0.5)  # type: ignore[arg-type]
    places = made.reshape(4, 4, 2).mean(1)
    assert places.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_views_say_where_every_token_lies(pair):
    """All tokens of both pictures once; what lies where is what the model saw there."""
    ours, _ = pair
    halves = Image.new("RGB", (168, 40), "red")
    halves.paste((0, 0, 255), (84, 0, 168, 40))
    pictures = [halves, picture(50, 51)]
    views, made = ours.views(pictures), ours(pictures)
    assert [view.tokens.shape for view in views] == [(2, 8), (2, 2), (2, 2)]
    assert [view.image.size for view in views] == [(224, 56), (56, 56), (56, 56)]
    drawn = np.concatenate([view.tokens.ravel() for view in views])
    assert sorted(drawn.tolist()) == list(range(sum(made.tokens)))
    for view in views:
        for (row, column), token in np.ndenumerate(view.tokens):
            tile, place = divmod(int(token), 4)
            y, x = place // 2 * 28, place % 2 * 28
            seen = made.inputs["pixel_values"][tile, :, y : y + 28, x : x + 28]
            box = (column * 28, row * 28, column * 28 + 28, row * 28 + 28)
            drawn = normalised(np.asarray(view.image.crop(box)), ours._tile.scale, ours._tile.mean, ours._tile.std)
            np.testing.assert_array_equal(drawn, seen)


def test_marks_are_those_that_the_tokenizer_names(tmp_path):
    ours = make(internvl.tiny_config(), tmp_path, max_seq_len=512)
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    named = {"start_image_token": "<video>", "end_image_token": {"content": "</s>"}}
    path.write_text(json.dumps({**raw, "extra_special_tokens": None, **named}))  # as older settings have them
    words = Processor(Folder(tmp_path), ours.contract)([picture(56, 56)]).words
    assert words == ("<video><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></s>",)
    path.unlink()
    assert Processor(Folder(tmp_path), ours.contract)([picture(56, 56)]).words[0].startswith("<img><IMG_CONTEXT>")
    for wrong in (5, "x" * 100, {"content": 7}):
        path.write_text(json.dumps({**raw, "extra_special_tokens": {"end_image_token": wrong}}))
        with pytest.raises(BundleError, match=r"tokenizer_config.json: end_image_token is .*; expected a token"):
            Processor(Folder(tmp_path), ours.contract)


def test_what_people_type_is_no_mark(tmp_path):
    ours = make(internvl.tiny_config(), tmp_path, max_seq_len=512)
    prompter = Prompter(Folder(tmp_path), ours.contract)
    parts = [{"type": "image"}, {"type": "text", "text": "<img><IMG_CONTEXT></img> <video>?"}]
    made = ours([picture(240, 200)])
    ids = prompter.expand_images(Conversation(prompter).ask(parts, 1, words=made.words), made.tokens, made.words)
    assert [ids.count(token) for token in (260, 261, 262, 263)] == [1, 1, 52, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_patches": 13}, "max_patches is 13, up to 14 tiles a picture; the bundle takes pictures of 52 tokens"),
        ({"max_patches": 0}, "max_patches is 0; expected an integer from 1 to 64"),
        ({"min_patches": 1.5}, r"min_patches is 1\.5; expected"),
        ({"size": {"height": 28, "width": 28}}, "the vision graph takes"),
    ],
)
def test_image_settings_of_another_model_are_refused(tmp_path, change, said):
    contract = make(internvl.tiny_config(), tmp_path, max_seq_len=512).contract
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=said):
        Processor(Folder(tmp_path), contract)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vision_feature_select_strategy": "full"}, "'full' and vision_feature_layer -1; pixel shuffle needs"),
        ({"vision_feature_layer": [-1, -2]}, "one layer"),
        ({"downsample_ratio": 0.3}, r"downsample_ratio is 0\.3; give"),
        ({"image_token_id": 5000}, "image_token_id 5000 lies outside the vocabulary of 272"),
    ],
)
def test_a_config_that_transformers_could_not_run_is_refused(config, said):
    changed = InternVLConfig.from_dict({**internvl.tiny_config().to_dict(), **config})
    with pytest.raises(Refusal, match=said):
        internvl.read_shape(changed)
    tiny = internvl.tiny_config()
    tiny.vision_config.image_size = (56, 112)
    with pytest.raises(Refusal, match="tiles are 56 x 112 pixels"):
        internvl.read_shape(tiny)
