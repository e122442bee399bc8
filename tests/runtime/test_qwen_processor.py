"""Qwen's way from pictures to patches, windows and positions, bit-equal with transformers' functions."""

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen2_5_VLModel, Qwen2VLModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vlmtrim.export.check_cli import generated_picture
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import Video
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import load_processor

MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel}
SIZES = [(240, 200), (56, 300), (300, 31), (9, 12), (1400, 1000), (84, 84), (70, 70)]  # width, height


@pytest.fixture(scope="module", params=MODELS)
def bundle(request, export_tiny):
    return open_bundle(export_tiny("qwen", family=request.param, max_batch=2, images=4))


@pytest.fixture(scope="module")
def processor(bundle):
    return load_processor(bundle.files, bundle.contract)


def sized(width, height, seed=0):
    return generated_picture(seed).resize((width, height))


@pytest.mark.parametrize("size", SIZES)
def test_patches_and_grid_are_transformers(bundle, processor, size):
    expected = AutoImageProcessor.from_pretrained(bundle.folder)(sized(*size), return_tensors="np")
    found = processor([sized(*size)])
    np.testing.assert_array_equal(
        found.inputs["pixel_values"].reshape(expected["pixel_values"].shape), expected["pixel_values"]
    )
    _, high, wide = expected["image_grid_thw"][0]
    assert found.tokens == (high * wide // 4,) and found.grids == ((high // 2, wide // 2, 0),)
    assert found.tokens[0] <= bundle.contract.image_tokens == 64


def test_indices_are_transformers(bundle, processor):
    """Several pictures and a video: rows and columns, frames, windows."""
    film = Video([sized(120, 90, seed) for seed in range(5)], fps=1.0)
    found = processor([sized(240, 200), sized(56, 300), film.load(), sized(84, 84)])
    grids = torch.tensor([(len(times), 2 * rows, 2 * columns) for rows, columns, *times in found.grids])
    assert grids[2, 0] == 3 and len(found.inputs["pixel_values"]) == sum(found.tokens)
    expected = get_vision_position_ids(grids, 2)
    np.testing.assert_array_equal(found.inputs["patch_positions"].reshape(-1, 2), expected)
    lengths = np.diff(get_vision_cu_seqlens(grids).numpy()) // 4
    np.testing.assert_array_equal(found.inputs["frame_ids"], np.repeat(np.arange(len(lengths)), lengths))
    if bundle.contract.family == "qwen2_vl":
        assert set(found.inputs) == {"pixel_values", "patch_positions", "frame_ids"}
        return
    order, ends = get_vision_window_index(grids, 2, window_size=56, patch_size=14)
    table, slots = found.inputs["window_tokens"], found.inputs["window_slots"]
    np.testing.assert_array_equal(table[table >= 0], order)
    np.testing.assert_array_equal((table >= 0).sum(1), np.diff(ends.numpy()) // 4)
    np.testing.assert_array_equal(table.ravel()[slots], np.arange(len(slots)))


def test_an_odd_frame_is_repeated_and_frames_share_the_bound(processor):
    frames = [sized(600, 400, seed) for seed in range(3)]
    found = processor([Video(frames).load()])
    rows, columns, *times = found.grids[0]
    assert len(times) == 2 and 20 < rows * columns <= 32
    last = found.inputs["pixel_values"].reshape(2, rows * columns, 4, 3, 2, 14, 14)[1]
    np.testing.assert_array_equal(last[:, :, :, 0], last[:, :, :, 1])
    still = processor([frames[2].resize((28 * columns, 28 * rows), Image.Resampling.BICUBIC)]).inputs["pixel_values"]
    np.testing.assert_array_equal(last.reshape(still.shape), still)


def test_positions_are_transformers(bundle, processor):
    """Two rows of other lengths, pictures and videos between words, conversations that go on."""
    mark, film = bundle.contract.image_token_id, Video([sized(120, 90, seed) for seed in range(8)], fps=3.0).load()
    pictures = processor([sized(240, 200), film, sized(56, 300), sized(84, 84)])
    a, b, c, d = ([mark] * tokens for tokens in pictures.tokens)
    rows = [[1, 2, *a, 3, *b, 4, 5, 6], [*c, 7, *d, 8]]
    counts = np.array([len(row) for row in rows])
    ids = np.zeros((2, counts.max()), dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    start = np.array([0, 17])
    positions, after = processor.positions(ids, counts, start, pictures)
    vision = types.SimpleNamespace(**json.loads((bundle.folder / "config.json").read_text())["vision_config"])
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    kind = MODELS[bundle.contract.family]
    model.get_vision_position_ids = lambda *args, **kwargs: kind.get_vision_position_ids(model, *args, **kwargs)
    grids = torch.tensor([(len(times), 2 * high, 2 * wide) for high, wide, *times in pictures.grids])
    kinds = [[0, 0, *(1 for _ in a), 0, *(2 for _ in b), 0, 0, 0], [*(1 for _ in c), 0, *(1 for _ in d), 0]]
    for row, (stills, films) in enumerate([([0], [1]), ([2, 3], [])]):
        expected, _ = kind.get_rope_index(
            model,
            torch.tensor([rows[row]]),
            torch.tensor([kinds[row]]),
            image_grid_thw=grids[stills],
            video_grid_thw=grids[films] if films else None,
            second_per_grid_ts=torch.tensor([2 / 3.0]),
        )
        np.testing.assert_array_equal(positions[:, row, : counts[row]], expected[:, 0] + start[row])
        assert after[row] == expected.max() + 1 + start[row]


def test_text_counts_on_along_all_axes(processor):
    """An image token that the model itself said is a word like any other."""
    ids = np.array([[5, processor.contract.image_token_id], [6, 0]])
    positions, after = processor.positions(ids, np.array([2, 0]), np.array([3, 9]), None)
    np.testing.assert_array_equal(positions[:, 0], np.tile([3, 4], (3, 1)))
    assert positions.shape == (3, 2, 2) and after.tolist() == [5, 9]


@pytest.mark.parametrize(
    ("width", "height", "frames", "why"),
    [(14, 4000, 1, "up to 200 times as long"), (28, 5000, 1, "crop it"), (300, 300, 160, "fewer frames")],
)
def test_what_does_not_fit_is_refused(processor, width, height, frames, why):
    picture = Image.new("RGB", (width, height))
    with pytest.raises(RuntimeRefusal, match=why):
        processor([picture if frames == 1 else Video([picture] * 2 * frames).load()])


@pytest.mark.parametrize(
    ("frames", "fps", "why"),
    [([], 1.0, "without frames"), ([(8, 8)], 0.0, "above 0"), ([(8, 8), (9, 8)], 1.0, "2 sizes")],
)
def test_frames_that_are_no_video_are_refused(frames, fps, why):
    with pytest.raises(RuntimeRefusal, match=why):
        Video([Image.new("RGB", size) for size in frames], fps).load()


def test_a_folder_of_frames_is_a_video(tmp_path):
    for name in ("b", "a"):
        Image.new("RGB", (9, 9), (255, 0, 0) if name == "a" else (0, 0, 0)).save(tmp_path / f"{name}.png")
    film = Video.of([tmp_path], 1.0).load()
    assert [frame.getpixel((0, 0)) for frame in film.frames] == [(255, 0, 0), (0, 0, 0)]
