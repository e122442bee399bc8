"""Videos of Qwen3-VL: frames in pairs behind their times in words, against transformers' own video path."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_turns import IMAGE, asked, assert_rows, assert_turns, conversation, film, sized
from torchless import function_of
from transformers import AutoTokenizer, Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from vlmtrim import runtime
from vlmtrim.export.families import qwen3_vl
from vlmtrim.export.oracles.reference_qwen3_vl import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

SIZES = [(96, 64), (640, 360), (30, 50), (1920, 1080), (33, 900), (64, 64)]  # width, height
START, VIDEO, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"


@pytest.fixture(scope="module")
def bundle(export_tiny):
    """Features are added behind layers 0 and 1, and the selection lies between them."""
    return open_bundle(export_tiny("qwen3-films", family="qwen3_vl", k=1, max_batch=2, images=2, image_tokens=64))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(qwen3_vl.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


def roomy(bundle, path, **change):
    """A processor for 4096 tokens of a picture, whose settings for videos are changed."""
    for name in ("config.json", "preprocessor_config.json"):
        (path / name).write_bytes((bundle.folder / name).read_bytes())
    settings = json.loads((bundle.folder / "video_preprocessor_config.json").read_text())
    (path / "video_preprocessor_config.json").write_text(json.dumps({**settings, **change}))
    return load_processor(Folder(path), dataclasses.replace(bundle.contract, image_tokens=4096))


def theirs(video, width, height):
    """What Qwen3VLProcessor writes in place of the mark of a video of so many pixels."""
    count = len(video.frames)
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token=START,
        vision_end_token=END,
        video_token=VIDEO,
        _calculate_timestamps=lambda *values: Qwen3VLProcessor._calculate_timestamps(own, *values),  # type: ignore
    )
    indices = [round(1000 * time) for time in video.seconds]
    made = {
        "video_grid_thw": torch.tensor([[-(-count // 2), height // 16, width // 16]]),
        "video_metadata": [VideoMetadata(count, fps=1000.0, frames_indices=indices)],
    }
    return Qwen3VLProcessor.replace_video_token(own, made, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("pruned", [True, False])
def test_videos_and_pictures_in_three_turns_equal_pytorch(session, reference, export_tiny, pruned):
    """A video alone, a picture before a video, words; transformers' own forward where nothing is pruned."""
    if not pruned:
        folder = export_tiny("film", family="qwen3_vl", method="none")
        session = Session(open_bundle(folder), make_backend("ort-cpu"))
        reference = Reference(qwen3_vl.MODEL_CLASS, folder, None)
    turns = conversation(
        session,
        ("What is in ", film(0, 6, fps=1.5), "?"),
        (sized(80, 50, 7), "and ", film(30, 2), "?"),
        ("Why?",),
    )
    assert_turns(session, reference, turns)


def test_rows_that_bring_a_picture_and_a_video_equal_single_runs(session, reference):
    assert_rows(session, reference, film(3, 4), sized(64, 64, 1), asked)


def test_what_deepstack_adds_to_a_video_is_transformers(session, reference):
    pictures = session.processor([film(0, 4).load(), sized(64, 64), film(9, 2, (64, 96)).load()])
    found = session.backend.to_host(session.encode_images(pictures))[0]
    grids = torch.tensor([(len(times), 2 * rows, 2 * columns) for rows, columns, *times in pictures.grids])
    assert grids.tolist() == [[2, 4, 6], [1, 4, 4], [1, 6, 4]] and pictures.tokens == (12, 4, 6)
    with torch.no_grad():
        patches = torch.from_numpy(pictures.inputs["pixel_values"]).flatten(0, 1)
        made = reference.model.model.visual(patches, grid_thw=grids)
    expected = torch.cat([made.pooler_output, *made.deepstack_features], dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_words_are_transformers_without_the_templates_marks_around(bundle, session, frames):
    """As transformers 4.57 wrote them, with which the model's authors trained; since 5.10 it leaves the two marks."""
    video = film(0, frames, times=[1.46 * number for number in range(frames)])
    ids, _ = asked(session, "Is ", video, "new?")
    replaced = theirs(video, 96, 64).replace(VIDEO, "<|image_pad|>")
    assert replaced.count("seconds>") == -(-frames // 2) and (frames != 5 or replaced.startswith("<0.7 seconds>"))
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder)
    assert ids == tokenizer(f"USER: Is  {replaced}new? ASSISTANT:")["input_ids"]
    prompt = runtime.Prompt("Is ", video, "new?")
    request = Preparer(bundle.contract, session.prompter, session.processor)(
        [runtime.Message("user", prompt)], 1, None, (), None
    )
    assert list(request.ids) == ids and request.visual == ids.count(IMAGE) == 6 * -(-frames // 2)


def test_what_people_type_is_no_mark_of_a_video(session):
    ids, _ = asked(session, f"Is {START}{VIDEO}{END} ", film(0, 4), "?")
    assert ids.count(IMAGE) == 12 and 262 not in ids and ids.count(260) == 2


def test_positions_are_transformers(session, reference):
    """Every two frames as a picture, text between them; a picture before and behind."""
    images = [sized(64, 96), film(0, 3).load(), sized(64, 64, 1), film(5, 2).load()]
    pictures = session.processor(images)
    ids = np.array([asked(session, "What ", *images, "?")[0]])
    found, after = session.processor.positions(ids, np.array([ids.size]), np.array([7]), pictures)
    each = [(rows, columns, len(times)) for rows, columns, *times in pictures.grids]
    grids = torch.tensor([(frames, 2 * rows, 2 * columns) for rows, columns, frames in each])
    films = torch.repeat_interleave(torch.tensor([1, 2, 1, 2]), torch.tensor(pictures.tokens))
    kinds = torch.zeros(1, ids.size, dtype=torch.int64)
    kinds[torch.from_numpy(ids == IMAGE)] = films
    expected, _ = Qwen3VLModel.get_rope_index(
        reference.model.model, torch.from_numpy(ids), kinds, image_grid_thw=grids[::2], video_grid_thw=grids[1::2]
    )
    np.testing.assert_array_equal(found, expected + 7)
    assert after[0] == expected.max() + 8


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("bounds", [(4096, 25_165_824), (200_000, 900_000), (131_072, 786_432)])
def test_sizes_are_transformers(bundle, tmp_path, bounds, capped):
    """Of one frame to 64, small and large ones; transformers takes no video of one frame, which counts as two here."""
    least, most = bounds
    size = {"shortest_edge": least, "longest_edge": most}
    processor = roomy(bundle, tmp_path, size=size, cap_pixels_per_frame=capped)
    resize = function_of("qwen3_vl", "smart_resize", math=math)
    room = min(most, 2 * 4096 * 32**2)
    for width, height in SIZES:
        for count in (2, 3, 4, 5, 7, 16, 64):
            limit = room
            if capped:
                limit = max(min(768 * 32**2, room // count), int(min(least, room) * 1.05)) * count
            high, wide = resize(count, height, width, 2, 32, min(least, room), limit)
            found = processor.shrunk(sized(width, height), count).size
            tokens = -(-count // 2) * (found[0] // 32) * (found[1] // 32)
            assert tokens <= 4096
            assert found == (wide, high) or -(-count // 2) * (high // 32) * (wide // 32) > 4096
    assert processor.shrunk(sized(96, 64), 1).size == processor.shrunk(sized(96, 64), 2).size


@pytest.mark.parametrize("fps", [0.5, 2.0, 3.7])
def test_frames_are_those_that_transformers_samples(bundle, tmp_path, fps):
    processor = roomy(bundle, tmp_path)
    sample = function_of("qwen3_vl", "sample_frames", np=np)
    own = SimpleNamespace(fps=2, num_frames=None, min_frames=4, max_frames=768)
    for total in (1, 3, 4, 5, 37, 100, 299, 1000, 20000):
        for rate in (10.0, 24.0, 29.97):
            expected = sample(own, VideoMetadata(total, fps=rate), fps=fps)
            np.testing.assert_array_equal(processor.frames(total, rate, fps), expected)


def test_no_more_frames_than_the_bundle_has_tokens_for(session):
    """Each two of them as large as the smallest picture, of 4 tokens."""
    assert session.processor.frames(5000, 24.0, 2.0).size == 2 * 64 // 4
    with pytest.raises(runtime.RuntimeRefusal, match=r"bundle takes 0 of one of 65 frames; .* fewer frames"):
        session.processor([film(0, 130, (32, 32)).load()])


def test_frames_are_normalised_by_the_settings_of_videos(bundle, session):
    """Which are others than those of pictures; the bundle's copy of them bounds a video's pixels."""
    video = film(0, 2).load()
    values = session.processor([video]).inputs["pixel_values"].reshape(2, 3, 2, 2, 3, 2, 16, 16)
    frames = np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame in video.opened])
    whole = values.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, 64, 96, 3)
    np.testing.assert_allclose(whole, frames * 2 - 1, atol=1e-6)
    settings = json.loads((bundle.folder / "video_preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 4096, "longest_edge": 2 * 64 * 32**2}


def test_settings_of_videos_that_are_none_are_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"video_preprocessor_config\.json: min_frames is 0"):
        roomy(bundle, tmp_path, min_frames=0)
