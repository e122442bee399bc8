"""LLaVA-OneVision's pictures: tiles bit-equal with transformers' image processor, weights of patches with torch's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel, image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from vlmtrim.export.families import llava_onevision
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.job_contract import build_contract
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.processors import llava_onevision as processors
from vlmtrim.runtime.processors.llava_onevision import Processor

# The published towers: SigLIP at 384 pixels, 36 resolutions, as transformers has them by default.
REAL = LlavaOnevisionConfig(
    text_config=Qwen2Config(
        vocab_size=152000, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2, pad_token_id=3
    ),
    vision_config=SiglipVisionConfig(image_size=384, patch_size=14),
)


def make(config: LlavaOnevisionConfig, folder, max_seq_len: int = 1024) -> Processor:
    llava_onevision.write_tiny_processor(folder, config)
    config.save_pretrained(folder)
    job = Job(model="", output="", max_seq_len=max_seq_len)
    return Processor(Folder(folder), build_contract(job, llava_onevision, config, torch.float32, folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our processor, transformers' processor) with tiles of 56 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    processor = make(llava_onevision.tiny_config(), folder)
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    return processor, LlavaOnevisionImageProcessorPil(**{k: v for k, v in raw.items() if k != "image_processor_type"})


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return make(REAL, tmp_path_factory.mktemp("real"), max_seq_len=32_768)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return generated_picture(seed).resize((width, height))


def check_tiles(tiny, *rows: list[Image.Image]) -> None:
    ours, theirs = tiny
    found = ours.of_rows(rows).inputs["pixel_values"]
    made = theirs([list(row) for row in rows], return_tensors="np", do_pad=False)["pixel_values"]
    np.testing.assert_array_equal(found, np.concatenate(list(made)).astype(np.float32))


@pytest.mark.parametrize(
    "size", [(112, 112), (56, 112), (168, 168), (640, 480), (100, 499), (57, 55), (300, 8), (17, 9), (1, 1), (1, 1000)]
)
def test_tiles_are_bit_equal_at_many_sizes(tiny, size):
    """Of a picture alone in its prompt, and of one among others."""
    check_tiles(tiny, [picture(*size)])
    check_tiles(tiny, [picture(*size), picture(*size[::-1], 1)], [picture(*size, 2)], [picture(50, 60)] * 3)


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99))
def test_tiles_are_bit_equal_at_any_size(tiny, width, height, seed):
    check_tiles(tiny, [picture(width, height, seed)], [picture(height, width, seed), picture(width, height, seed)])


def packed(config: LlavaOnevisionConfig, rows: list[list[tuple[int, int]]], features: np.ndarray) -> np.ndarray:
    """What transformers' model packs of features [tiles, P, D] and, last, the newline; sizes are height and width."""
    alone = [len(row) == 1 for row in rows for _ in row]
    sizes = [size for row in rows for size in row]
    side = config.vision_config.image_size // config.vision_config.patch_size
    model = SimpleNamespace(config=config)
    counts = [_tiles(config, size) if one else 1 for size, one in zip(sizes, alone, strict=True)]
    table = torch.from_numpy(features)
    of_picture = list(table[:-1].reshape(-1, side * side, features.shape[1]).split(counts))
    aspect = config.vision_aspect_ratio
    parts, _ = LlavaOnevisionModel.pack_image_features(model, of_picture, torch.tensor(sizes), table[-1], aspect)  # type: ignore[arg-type]
    return torch.cat(parts).numpy()


def _tiles(config, size):
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


any_size = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.lists(any_size, min_size=1, max_size=2), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_tokens_are_the_model_s_own_at_any_size(real, rows, seed):
    """Features that are random numbers: the same sums of them, for rows of one and two pictures."""
    config, patches = REAL, 27 * 27
    tiles = sum(_tiles(config, row[0]) if len(row) == 1 else len(row) for row in rows)
    features = np.random.default_rng(seed).normal(size=(tiles * patches + 1, 2)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:  # of no interest here, and large
        patch.setattr(real, "_stacked", lambda cut: np.zeros(sum(map(len, cut))))
        patch.setattr(real, "_tiles", lambda image: [image] * _tiles(config, (image.height, image.width)))
        made = real.of_rows([[Image.new("L", size[::-1]) for size in row] for row in rows])
    index, weights = made.inputs["feature_index"], made.inputs["feature_weights"]
    expected = packed(config, rows, features)
    assert index.dtype == np.int64 and weights.dtype == np.float32 and sum(made.tokens) == len(index) == len(expected)
    np.testing.assert_allclose((features[index] * weights[:, :, None]).sum(1), expected, rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=100)
@given(patches=st.integers(1, 300), part=st.floats(0.01, 1))
def test_weights_along_an_axis_are_torch_s_to_the_bit(patches, part):
    tokens = max(1, int(patches * part))
    expected = F.interpolate(torch.eye(patches)[None, :, :, None], [tokens, 1], mode="bilinear")[0, :, :, 0].numpy()
    nearest, weights = processors._along(patches, tokens)
    found = np.zeros((patches, tokens), dtype=np.float32)
    for corner in range(2):
        np.add.at(found, (nearest[:, corner], np.arange(tokens)), weights[:, corner])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sizes", [((12, 12), (8, 8)), ((12, 8), (9, 6)), ((9, 7), (5, 6)), ((4, 4), (4, 4))])
def test_weights_on_a_grid_are_torch_s_to_the_bit(sizes):
    (rows, columns), small = sizes
    many = rows * columns
    expected = F.interpolate(torch.eye(many).reshape(1, many, rows, columns), list(small), mode="bilinear")[0]
    index, weights = processors._blended(np.arange(many).reshape(rows, columns), small)
    found = np.zeros((many, len(index)), dtype=np.float32)
    for corner in range(4):
        np.add.at(found, (index[:, corner], np.arange(len(index))), weights[:, corner])
    np.testing.assert_array_equal(found, expected.reshape(many, -1).numpy())


@settings(deadline=None, max_examples=200)
@given(size=any_size)
def test_the_number_of_tokens_is_what_the_prompt_is_expanded_by(real, size):
    """transformers counts by itself how often a prompt repeats the image token."""
    counter = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=REAL.image_grid_pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    counter._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(counter)
    expected = LlavaOnevisionProcessor._get_number_of_features(counter, *size, 384, 384)  # type: ignore[arg-type]
    rows, columns = real._laid(*real._grid(size, 0).shape)
    assert 729 + rows * (columns + 1) == expected <= real.contract.image_tokens


def test_the_contract_holds_the_largest_picture(real):
    """1.21 times the patches of nine tiles, and a newline for each of 162 rows; the largest there is has 64 less."""
    contract = real.contract
    assert contract.image_tokens == 729 + 7938 + 162 == 8829
    rows, columns = real._laid(*real._grid((1153, 950), 0).shape)
    assert (rows, columns) == (98, 81) and 729 + rows * (columns + 1) == 8765
    assert real._laid(*real._grid((2304, 2304), 0).shape) == (81, 81)
    assert contract.dims["N"] == (0, 32_768) and contract.max_images == 3
    assert contract.dims["T"] == (2, 6 * 37) and contract.dims["M"] == (729, 6 * 8829)


def test_a_picture_is_one_tile_where_its_prompt_has_several(tiny):
    ours, _ = tiny
    images = [picture(168, 168), picture(100, 30, 1), picture(168, 168, 2)]
    together, apart = ours(images), ours.of_rows([[image] for image in images])
    assert together.tokens == (17, 17, 17) and len(together.inputs["pixel_values"]) == 3
    assert apart.tokens == (16 + 8 * 9, 16 + 2 * 9, 16 + 8 * 9) and len(apart.inputs["pixel_values"]) == 10 + 3 + 10
    index = together.inputs["feature_index"][:, 0]
    assert index.tolist() == [*range(16), 48, *range(16, 32), 48, *range(32, 48), 48]
    mixed = ours.of_rows([images[:1], images[1:]])
    assert mixed.tokens == (88, 17, 17)


def test_more_tiles_than_the_bundle_takes_are_refused(tiny):
    ours, _ = tiny
    most = ours.contract.dims["T"][1]
    with pytest.raises(RuntimeRefusal, match=rf"become {most + 10} tiles, the bundle takes {most} .*--max-seq-len"):
        ours.of_rows([[picture(168, 168)]] * (most // 10 + 1))


def test_views_say_where_every_token_lies(tiny):
    """Every token but newlines once; of a picture that is resampled, its smaller grid on the same part."""
    ours, _ = tiny
    for images, shapes in (
        ([picture(168, 168)], [(4, 4), (8, 8)]),
        ([picture(168, 120)], [(4, 4), (6, 9)]),
        ([picture(400, 9)], [(4, 4)]),
        ([picture(168, 60), picture(30, 90, 1)], [(4, 4), (4, 4)]),
    ):
        made, views = ours(images), ours.views(images)
        index, newline = made.inputs["feature_index"][:, 0], len(made.inputs["pixel_values"]) * 16
        assert [view.tokens.shape for view in views] == shapes
        drawn = np.concatenate([view.tokens.ravel() for view in views])
        assert sorted(drawn.tolist()) == np.flatnonzero(index != newline).tolist()
    red = Image.new("RGB", (168, 28), "red")
    whole = ours.views([red, red])[1].image
    assert whole.size == (56, 56) and whole.getpixel((28, 28)) == (255, 0, 0) and whole.getpixel((28, 5)) == (127,) * 3


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("preprocessor_config.json", {"image_grid_pinpoints": [[56, 112]]}, "do not fit the model"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "the vision graph takes"),
        ("config.json", {"vision_aspect_ratio": "anyres_max_9"}, "do not fit the model"),
        ("config.json", {"vision_aspect_ratio": "square"}, "config.json: vision_aspect_ratio is 'square'; expected"),
        ("config.json", {"vision_aspect_ratio": 9}, "config.json: vision_aspect_ratio is 9; expected"),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path, file, change, reason):
    contract = make(llava_onevision.tiny_config(), tmp_path).contract
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BundleError, match=reason):
        Processor(Folder(tmp_path), contract)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"vision_feature_select_strategy": "default"}, "'default' makes 15 features of 4 x 4 patches"),
        ({"image_grid_pinpoints": [[56, 100]]}, "holds 56 x 100, no multiple of the tower's 56"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres'; expected anyres_max_"),
        (
            {"vision_aspect_ratio": "anyres_max_1", "image_grid_pinpoints": [[56, 280]]},
            "has 5 tiles in a line, of which anyres_max_1 leaves rows without tokens",
        ),
    ],
)
def test_a_config_that_transformers_could_not_run_is_refused(config, reason):
    changed = LlavaOnevisionConfig.from_dict({**llava_onevision.tiny_config().to_dict(), **config})
    with pytest.raises(Refusal, match=reason):
        llava_onevision.read_shape(changed)
