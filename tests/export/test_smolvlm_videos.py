"""Videos of SmolVLM2: a tile for every frame, behind its time in words, against transformers."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from num2words import num2words
from qwen_turns import asked, assert_rows, assert_turns, conversation, film, sized
from torchless import function_of
from transformers import AutoTokenizer
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.video_utils import VideoMetadata

from vlmtrim import runtime
from vlmtrim.export.families import smolvlm
from vlmtrim.export.oracles.reference_smolvlm import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.runtime import Video
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.processors.smolvlm import spelled
from vlmtrim.runtime.prompt import Prompter
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

IMAGE, FRAME = 259, 4  # visual tokens of a frame
MARKS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("smol", family="smolvlm", k=2, r=0.5, max_batch=2, max_seq_len=1024))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(smolvlm.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


def theirs(video):
    """What SmolVLMProcessor writes in place of a video's mark."""
    indices = [round(1000 * time) for time in video.seconds]
    metadata = VideoMetadata(len(indices), fps=1000.0, duration=video.duration, frames_indices=indices)
    made = {"pixel_values": torch.zeros(1, len(indices), 3, 56, 56), "video_metadata": [metadata]}
    return SmolVLMProcessor.replace_video_token(SimpleNamespace(**MARKS, image_seq_len=FRAME), made, 0)  # type: ignore


def changed(bundle, path, **change):
    """A processor whose settings are changed."""
    for name in ("config.json", "preprocessor_config.json"):
        (path / name).write_bytes((bundle.folder / name).read_bytes())
    settings = json.loads((bundle.folder / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps({**settings, **change}))
    return load_processor(Folder(path), bundle.contract)


@pytest.mark.parametrize("pruned", [True, False])
def test_videos_and_pictures_in_three_turns_equal_pytorch(session, reference, export_tiny, pruned):
    """A video alone, a picture of several tiles before a video, words."""
    if not pruned:
        folder = export_tiny("film", family="smolvlm", method="none", max_seq_len=1024)
        session = Session(open_bundle(folder), make_backend("ort-cpu"))
        reference = Reference(smolvlm.MODEL_CLASS, folder, None)
    turns = conversation(
        session,
        ("What is in ", film(0, 4), "?"),
        (sized(80, 50, 7), "and ", film(30, 2, (300, 31)), "?"),
        ("Why?",),
    )
    assert_turns(session, reference, turns)


def test_rows_that_bring_a_picture_and_a_video_equal_single_runs(session, reference):
    assert_rows(session, reference, film(3, 2), sized(40, 30, 1), asked)


@pytest.mark.parametrize("duration", [None, 6.9, 4000.0])
def test_prompts_are_those_of_transformers(bundle, session, duration):
    """For a chat and for a server's slots."""
    video = film(0, 3, times=[0.0, 61.5, 3599.9], duration=duration)
    replaced = theirs(video)
    assert "series of three frames from a " in replaced and "\nFrame from 59:59:<fake_token" in replaced
    tokenizer = AutoTokenizer.from_pretrained(bundle.folder)
    expected = tokenizer(f"User: In{replaced} new?<end_of_utterance>\nAssistant:")["input_ids"]
    ids, _ = asked(session, "In", video, "new?")
    assert ids == expected and ids.count(IMAGE) == FRAME * 3
    prompt = runtime.Prompt("In", video, "new?")
    request = Preparer(bundle.contract, session.prompter, session.processor)(
        [runtime.Message("user", prompt)], 1, None, (), None
    )
    assert list(request.ids) == expected and request.visual == FRAME * 3


def test_a_template_that_knows_no_videos_is_given_their_words(bundle, session, tmp_path):
    """As of checkpoints whose template transformers replaces where a video is asked about."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bundle.folder / name).read_bytes())
    template = (bundle.folder / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template.replace("== 'video'", "== 'film'"))
    older = SimpleNamespace(
        prompter=Prompter(Folder(tmp_path), bundle.contract, "<video>"), processor=session.processor
    )
    for parts in (("Say <video> <image>", film(0), "?"), (film(0), sized(30, 30), "?")):
        ids, _ = asked(older, *parts)
        assert ids.count(IMAGE) == FRAME * (3 + 10 * (len(parts) == 3 and parts[0] != "Say <video> <image>"))


def test_numbers_are_spelled_as_num2words_spells_them():
    numbers = range(4097)
    assert [spelled(number) for number in numbers] == [num2words(number) for number in numbers]


def test_frames_are_tiles_of_transformers_size_for_videos(bundle, session, tmp_path):
    """Scaled twice, as pictures are that are not cut into tiles; one of a film stays as it was shrunk."""
    video = film(0, 2, (300, 200)).load()
    made = session.processor([sized(56, 56), video])
    plain = changed(bundle, tmp_path, do_image_splitting=False)(video.opened)
    np.testing.assert_array_equal(made.inputs["pixel_values"][-2:], plain.inputs["pixel_values"])
    shrunk = Video([session.processor.shrunk(frame, 2) for frame in video.opened], shrunk_from=(300, 200))
    again = session.processor([shrunk.load()]).inputs["pixel_values"]
    np.testing.assert_array_equal(made.inputs["pixel_values"][-2:], again)
    views = session.processor.views([sized(56, 56), video])
    assert [view.tokens.ravel().tolist() for view in views[-2:]] == [[*range(n, n + 4)] for n in (40, 44)]


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.7])
def test_frames_are_those_that_transformers_samples(bundle, session, fps):
    """At most 64 here, half of the bundle's length; a shorter one takes fewer."""
    sample = function_of("smolvlm", "sample_frames", np=np)
    for total in (1, 3, 5, 37, 100, 299, 1000, 20000):
        for rate in (10.0, 24.0, 29.97):
            own = SimpleNamespace(num_frames=64, fps=1)
            expected = sample(own, VideoMetadata(total, fps=rate, duration=total / rate), fps=fps)
            np.testing.assert_array_equal(session.processor.frames(total, rate, fps), expected)
    short = dataclasses.replace(bundle.contract, max_seq_len=100)
    assert load_processor(bundle.files, short).frames(1000, 10.0, fps).size == 50 // FRAME


def test_a_video_longer_than_the_bundle_takes_is_refused(session, monkeypatch):
    """Before a frame is scaled."""
    most = session.contract.dims["T"][1]
    monkeypatch.setattr(type(session.processor), "shrunk", None)
    with pytest.raises(runtime.RuntimeRefusal, match=f"{most + 1} tiles"):
        session.processor([Video([sized(1, 1)] * (most + 1)).load()])


def test_settings_of_videos_are_read(bundle, session, tmp_path):
    sampling = {"fps": 0.25, "max_frames": 7, "video_size": {"longest_edge": 90}}
    processor = changed(bundle, tmp_path, video_sampling=sampling)
    assert session.processor.film_fps == 1.0 and processor.film_fps == 0.25
    assert processor.frames(10_000, 10.0, 1.0).size == 7
    with pytest.raises(BundleError, match=r"video_sampling: fps is 'x'"):
        changed(bundle, tmp_path, video_sampling={"fps": "x"})
