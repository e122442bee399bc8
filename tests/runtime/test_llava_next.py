"""LLaVA-NeXT's pictures: tiles bit-equal with transformers' image processor, tokens in its order, at any size."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from vlmtrim.export.families import llava_next
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.job_contract import build_contract
from vlmtrim.export.tracing import tiles
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.llava_next import Processor

# LLaVA-1.6: CLIP-L/14 at 336 pixels, the five resolutions of its configs.
REAL = LlavaNextConfig(
    text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=32768),
    vision_config=CLIPVisionConfig(image_size=336, patch_size=14),
)


def make(config: LlavaNextConfig, folder, max_seq_len: int = 1024) -> Processor:
    llava_next.write_tiny_processor(folder, config)
    job = Job(model="", output="", max_seq_len=max_seq_len)
    return Processor(Folder(folder), build_contract(job, llava_next, config, torch.float32, folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our processor, transformers' processor) with tiles of 56 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    processor = make(llava_next.tiny_config(), folder)
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    return processor, LlavaNextImageProcessorPil(**{k: v for k, v in raw.items() if k != "image_processor_type"})


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make(REAL, tmp_path_factory.mktemp("real"), max_seq_len=16_384)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray((noise // 2 + ramp // 2).astype(np.uint8))


def check_tiles(tiny, *pictures: Image.Image) -> None:
    ours, theirs = tiny
    found = ours(pictures).inputs["pixel_values"]
    expected = np.concatenate(
        [theirs(image, return_tensors="np")["pixel_values"][0].astype(np.float32) for image in pictures]
    )
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "size",
    [(112, 112), (56, 112), (112, 56), (168, 56), (56, 168), (640, 480), (480, 640), (500, 100), (100, 499), (57, 55),
     (31, 47), (8, 300), (300, 8), (1, 1), (1, 200)],
)  # fmt: skip
def test_tiles_are_bit_equal_at_many_sizes(tiny, size):
    check_tiles(tiny, picture(*size))


@settings(deadline=None, max_examples=40)
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99))
def test_tiles_are_bit_equal_at_any_size(tiny, width, height, seed):
    check_tiles(tiny, picture(width, height, seed), picture(height, width, seed + 1))


def packed(config: LlavaNextConfig, sizes: list[tuple[int, int]]) -> list[int]:
    """What transformers' model packs, of features that are their own numbers; the newline token is the last number."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    features, first = [], 0
    for height, width in sizes:
        down, across = tiles.tile_grid(
            _best(config, height, width), config.vision_config.image_size
        )  # transformers wants the number of tiles to split by
        count = (1 + down * across) * side * side
        features.append(torch.arange(first, first + count, dtype=torch.float64).reshape(-1, side * side, 1))
        first += count
    model = SimpleNamespace(config=config)
    newline = torch.tensor([float(first)], dtype=torch.float64)
    parts, _ = LlavaNextModel.pack_image_features(
        model,  # type: ignore[arg-type]
        features,
        torch.tensor(sizes),
        vision_feature_select_strategy="default",
        image_newline=newline,
    )
    return torch.cat(parts)[:, 0].long().tolist()


def _best(config, height, width):
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution((height, width), config.image_grid_pinpoints)


any_size = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(any_size, min_size=1, max_size=3))
def test_tokens_are_the_model_s_own_at_any_size(real, sizes):
    """Index of every visual token, for one to three pictures (height, width) in one step."""
    tiles, index = [], []
    for size in sizes:
        tiles.append(len(real._tiles(Image.new("RGB", size[::-1]))))
    newline = sum(tiles) * 576
    for number, size in enumerate(sizes):
        index += real._feature_index(size, sum(tiles[:number]), newline).tolist()
    assert index == packed(REAL, sizes)


@settings(deadline=None, max_examples=200)
@given(size=any_size)
def test_the_number_of_tokens_is_what_the_prompt_is_expanded_by(real, size):
    """transformers counts by itself how often a prompt repeats the image token."""
    counter = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=REAL.image_grid_pinpoints),
        patch_size=14,
        num_additional_image_tokens=1,
    )
    counter._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(counter)
    expected = LlavaNextProcessor._get_number_of_features(counter, *size, 336, 336) - 1  # type: ignore[arg-type]
    found = len(real._feature_index(size, 0, 0))
    assert found == expected <= real.contract.image_tokens


def test_the_contract_holds_the_largest_picture(real):
    """LLaVA-1.6: a square fills four tiles: 576 patches squeezed, 48 rows of 48 and a newline."""
    contract = real.contract
    assert contract.image_tokens == 576 + 48 * 49 == len(real._feature_index((672, 672), 0, 0)) == 2928
    assert contract.dims["N"] == (0, 16_384) and contract.max_images == 5
    assert contract.dims["T"] == (2, 50) and contract.dims["M"] == (576, 10 * 2928)


def test_pictures_of_one_step_follow_each_other(tiny):
    """Sizes of their own: the second picture's tokens point behind the first one's tiles, the newline behind both."""
    ours, _ = tiny
    pictures = ours([picture(112, 112), picture(168, 56)])
    index = pictures.inputs["feature_index"]
    assert pictures.tokens == (16 + 8 * 9, 16 + 4 * 13) and len(pictures.inputs["pixel_values"]) == 5 + 4
    assert index.dtype == np.int64 and len(index) == sum(pictures.tokens)
    assert index[:16].tolist() == list(range(16)) and index[88:104].tolist() == list(range(80, 96))
    assert (index == 9 * 16).sum() == 8 + 4


def test_more_tiles_than_the_bundle_takes_are_refused(tiny):
    ours, _ = tiny
    most = ours.contract.dims["T"][1]
    with pytest.raises(RuntimeRefusal, match=rf"become {most + 5} tiles, the bundle takes {most} .*--max-seq-len"):
        ours([picture(112, 112)] * (most // 5 + 1))


def test_views_say_where_every_token_lies(tiny):
    """All patches of all pictures once, newlines never; what lies where has the colour that the model saw there."""
    ours, _ = tiny
    thin = Image.new("RGB", (400, 9), "red")  # nothing of it is left when its padding goes
    halves = Image.new("RGB", (168, 40), "red")
    halves.paste((0, 0, 255), (84, 0, 168, 40))
    pictures = [halves, thin, picture(50, 110)]
    views = ours.views(pictures)
    made = ours(pictures)
    index, newline = made.inputs["feature_index"], len(made.inputs["pixel_values"]) * 16
    drawn = np.concatenate([view.tokens.ravel() for view in views])
    assert sorted(drawn.tolist()) == np.flatnonzero(index != newline).tolist()
    assert [view.tokens.shape for view in views] == [(4, 4), (2, 12), (4, 4), (4, 4), (8, 4)]
    assert [view.image.size for view in views] == [(56, 56), (168, 28), (56, 56), (56, 56), (56, 112)]
    assert views[1].image.getpixel((10, 14)) == (255, 0, 0) and views[1].image.getpixel((160, 14)) == (0, 0, 255)
    # the tile and place in it that a drawn token was made of, by its number
    tiles = np.concatenate([np.stack([np.asarray(tile) for tile in ours._tiles(image)]) for image in pictures])
    for view in (views[1], views[4]):
        for (row, column), token in np.ndenumerate(view.tokens):
            tile, patch = divmod(int(index[token]), 16)
            y, x = patch // 4 * 14, patch % 4 * 14
            box = (column * 14, row * 14, column * 14 + 14, row * 14 + 14)
            np.testing.assert_array_equal(np.asarray(view.image.crop(box)), tiles[tile, y : y + 14, x : x + 14])


@pytest.mark.parametrize("change", [{"image_grid_pinpoints": [[56, 112]]}, {"crop_size": {"height": 28, "width": 28}}])
def test_image_settings_of_another_model_are_refused(tmp_path, change):
    contract = make(llava_next.tiny_config(), tmp_path).contract
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=r"do not fit the model|the vision graph takes"):
        Processor(Folder(tmp_path), contract)


def test_settings_without_resolutions_mean_transformers_own(tmp_path):
    contract = make(REAL, tmp_path, max_seq_len=4096).contract
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "image_grid_pinpoints"}))
    assert Processor(Folder(tmp_path), contract)([Image.new("RGB", (700, 200))]).tokens == (
        len(packed(REAL, [(200, 700)])),
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"vision_feature_select_strategy": "full"}, "'full' makes 17 features of 4 x 4 patches"),
        ({"image_grid_pinpoints": [[56, 100]]}, "holds 56 x 100, no multiple of the tower's 56"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is empty"),
    ],
)
def test_a_config_that_transformers_could_not_run_is_refused(config, reason):
    changed = LlavaNextConfig.from_dict({**llava_next.tiny_config().to_dict(), **config})
    with pytest.raises(Refusal, match=reason):
        llava_next.read_shape(changed)


def test_the_shape_is_read_from_any_tower():
    shape = llava_next.read_shape(llava_next.tiny_config(text="qwen2", vision="siglip_vision_model"))
    assert dataclasses.asdict(shape)["tile_tokens"] == 16 and shape.most_tiles == 5 and shape.image_tokens == 88
