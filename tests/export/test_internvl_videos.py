"""Videos of InternVL: a tile for every frame, behind its number in words, against transformers."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from qwen_turns import asked, assert_rows, assert_turns, conversation, film, sized
from torchless import function_of
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.video_utils import VideoMetadata

from vlmtrim import runtime
from vlmtrim.export.families import internvl
from vlmtrim.export.oracles.reference_internvl import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

IMAGE, VIDEO, FRAME = 262, 263, 4  # visual tokens of a frame


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("internvl", family="internvl", k=2, r=0.5, max_batch=2, images=4, image_tokens=52))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(internvl.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


@pytest.mark.parametrize("pruned", [True, False])
def test_videos_and_pictures_in_three_turns_equal_pytorch(session, reference, export_tiny, pruned):
    """A video alone, a picture of several tiles before a video, words."""
    if not pruned:
        folder = export_tiny("film", family="internvl", method="none")
        session = Session(open_bundle(folder), make_backend("ort-cpu"))
        reference = Reference(internvl.MODEL_CLASS, folder, None)
    turns = conversation(
        session,
        ("What is in ", film(0, 5), "?"),
        (sized(80, 50, 7), "and ", film(30, 2, (300, 31)), "?"),
        ("Why?",),
    )
    assert_turns(session, reference, turns)


def test_rows_that_bring_a_picture_and_a_video_equal_single_runs(session, reference):
    assert_rows(session, reference, film(3), sized(56, 56, 1), asked)


def test_prompts_are_those_of_transformers(bundle, session, reference):
    """With what its processor writes for a video in place of its mark; for a chat and for a server's slots."""
    theirs, picture, video = reference._processor, sized(56, 56, 1), film(0)
    made = {"pixel_values_videos": [torch.zeros(3, 3, 56, 56)]}
    replaced = InternVLProcessor.replace_video_token(theirs, made, 0)
    assert re.findall(r"(?:^|\n)Frame\d: ", replaced) == ["Frame1: ", "\nFrame2: ", "\nFrame3: "]
    text = theirs.replace_image_token({"num_patches": [1]}, 0)
    expected = theirs.tokenizer(f"USER: In  {text}\n and  {replaced}\n? ASSISTANT:")["input_ids"]
    ids, _ = asked(session, "In ", picture, " and ", video, "?")
    assert ids == expected and ids.count(IMAGE) == FRAME * 4
    prompt = runtime.Prompt("In ", runtime.Image(picture), " and ", video, "?")
    request = Preparer(bundle.contract, session.prompter, session.processor)(
        [runtime.Message("user", prompt)], 1, None, (), None
    )
    assert list(request.ids) == expected and request.visual == FRAME * 4


def test_what_people_type_is_no_mark_of_a_video(session):
    ids, _ = asked(session, "Is <video> ", film(0), "new?")
    assert ids.count(IMAGE) == FRAME * 3 and VIDEO not in ids


def test_frames_are_prepared_by_the_settings_of_videos(session):
    """Whose colours are others than those of pictures; a frame of a tile's size is not scaled."""
    video = film(0, 2, (56, 56)).load()
    expected = [np.asarray(frame, dtype=np.float32).transpose(2, 0, 1) / 255 * 2 - 1 for frame in video.opened]
    made = session.processor([sized(56, 56), video])
    np.testing.assert_allclose(made.inputs["pixel_values"][1:], expected, atol=1e-6)
    assert made.tokens == (FRAME, 2 * FRAME)
    views = session.processor.views([sized(56, 56), video])
    assert [view.tokens.ravel().tolist() for view in views] == [[*range(n, n + 4)] for n in (0, 4, 8)]


@pytest.mark.parametrize("total", [8, 9, 60, 299, 20000])
def test_eight_frames_are_those_that_transformers_samples(session, total):
    sample = function_of("internvl", "sample_frames", torch=torch)
    own = SimpleNamespace(num_frames=8, initial_shift=True)
    expected = sample(own, VideoMetadata(total, fps=10.0)).numpy()
    np.testing.assert_array_equal(session.processor.frames(total, 10.0, 2.0), expected)
    assert session.processor.frames(3, 10.0, 2.0).tolist() == [0, 1, 2]


def test_a_video_longer_than_the_bundle_takes_is_refused(session, monkeypatch):
    """Before a frame is scaled."""
    most = session.contract.dims["T"][1]
    monkeypatch.setattr(type(session.processor), "shrunk", None)
    with pytest.raises(runtime.RuntimeRefusal, match=f"{most + 1} tiles"):
        session.processor([film(0, most + 1, (56, 56)).load()])
