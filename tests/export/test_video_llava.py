"""Video-LLaVA beyond what every family is tested for: videos beside pictures, in any order, and both towers."""

import numpy as np
import pytest
import torch
from qwen_turns import parity, sized
from transformers import AutoImageProcessor

from vlmtrim import runtime
from vlmtrim.export import pipeline
from vlmtrim.export.families import video_llava
from vlmtrim.export.job import Job
from vlmtrim.export.oracles.reference_video_llava import Reference
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import Video
from vlmtrim.runtime.measure.check import Turn, record
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

IMAGE, VIDEO, PATCHES, FRAME = 259, 260, 16, 17
SIZES = [(240, 200), (64, 300), (300, 31), (9, 12), (1400, 1000), (56, 56)]  # width, height


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("video", family="video_llava", max_batch=2, k=1))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


def film(seed, frames, size=(96, 72)):
    return Video(tuple(sized(*size, seed + number) for number in range(frames)))


def prompt(session, *parts):
    """Words, pictures and videos -> ids as a bundle takes them, and the pictures."""
    shown = tuple(part for part in parts if not isinstance(part, list))
    tokens = iter(session.processor(shown).tokens) if shown else iter(())
    ids = [256]
    for part in parts:
        ids += part if isinstance(part, list) else [IMAGE] * next(tokens)
    return ids, shown


@pytest.mark.parametrize("size", SIZES)
def test_squares_are_transformers(bundle, session, size):
    theirs = AutoImageProcessor.from_pretrained(bundle.folder)
    expected = theirs(sized(*size), return_tensors="np", return_legacy_image_output=False)["pixel_values"]
    np.testing.assert_array_equal(session.processor([sized(*size)]).inputs["pixel_values"], expected)
    np.testing.assert_array_equal(session.processor([film(0, 2, size)]).inputs["frame_values"][0], expected[0])


def test_pictures_and_frames_go_through_their_own_towers(session, bundle):
    """In the order of the prompt, whatever stands first; a class token leads every frame and no picture."""
    full = Reference(video_llava.MODEL_CLASS, bundle.folder, None).model.model
    parts = [film(10, 3), sized(64, 64, 1), film(20, 2), sized(90, 60, 2)]
    pictures = session.processor(parts)
    assert pictures.tokens == (3 * FRAME, PATCHES, 2 * FRAME, PATCHES)
    found = session.backend.to_host(session.encode_images(pictures))[0]
    squares = torch.from_numpy(pictures.inputs["pixel_values"])
    frames = torch.from_numpy(pictures.inputs["frame_values"])
    with torch.no_grad():
        still = full.get_image_features(squares).pooler_output
        moving = full.get_video_features(frames[None]).pooler_output
    expected = [moving[:3].flatten(0, 1), still[0], moving[3:].flatten(0, 1), still[1]]
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), atol=1e-5)


@pytest.mark.parametrize("method", ["fastv", "none"])
def test_videos_and_pictures_in_three_turns_equal_pytorch(method, export_tiny):
    """A video alone, a picture before a video, words; transformers' own forward where nothing is pruned."""
    bundle = open_bundle(export_tiny("films", family="video_llava", method=method, max_batch=2))
    session = Session(bundle, make_backend("ort-cpu"))
    reference = Reference(video_llava.MODEL_CLASS, bundle.folder, bundle.contract.selection)
    turns = [
        prompt(session, [1, 2], film(0, 4), [3, 4]),
        prompt(session, [5], sized(80, 50, 7), [6], film(30, 2), [7, 8]),
        prompt(session, [9, 10]),
    ]
    for number, (ids, shown) in enumerate(turns):
        turn = Turn(str(number), ids, shown, opens=not number)
        expected, tokens = reference.record(turn, 6)
        found, _ = record(session, turn, tokens)
        assert parity(turn.name, found, expected, bundle)


def test_rows_that_bring_a_picture_and_a_video_equal_single_runs(bundle):
    """In another order, and with other words."""
    reference = Reference(video_llava.MODEL_CLASS, bundle.folder, bundle.contract.selection)
    single, batch = (Session(bundle, make_backend("ort-cpu"), batch=rows) for rows in (1, 2))
    prompts = [prompt(single, [1], film(0, 2), sized(60, 60, 1), [2]), prompt(single, sized(50, 99, 2), film(9, 2))]
    prefill = batch.prefill([ids for ids, _ in prompts], batch.processor([p for _, shown in prompts for p in shown]))
    for row, (ids, shown) in enumerate(prompts):
        expected, _ = reference.record(Turn("row", ids, shown), 0)
        np.testing.assert_allclose(prefill.logits[row], expected.logits[0], atol=1e-4)
        np.testing.assert_array_equal(prefill.kept_indices[row][: len(expected.kept)], expected.kept)


def test_a_chat_takes_videos_beside_pictures(bundle):
    chat = runtime.Chat(Session(bundle, make_backend("ort-cpu")))
    question = runtime.Prompt("Is", runtime.Image(sized(84, 84)), "in", film(0, 3), "?")
    first = next(iter(chat.generate(question, max_new_tokens=1)))
    assert first.prefill.visual == PATCHES + 3 * FRAME
    rendered = chat.session.prompter.render([{"role": "user", "content": question.content()}])
    assert rendered.text == "USER: Is <image>\nin <video>\n? ASSISTANT:"
    ids = chat.session.prompter.encode(rendered, True)
    assert VIDEO not in ids and ids.count(IMAGE) == 2


def test_class_tokens_lie_on_no_view(session):
    parts = [film(3, 2), sized(64, 64)]
    views = session.processor.views(parts)
    seen = np.concatenate([view.tokens.ravel() for view in views])
    assert seen.tolist() == [*range(1, 17), *range(18, 34), *range(34, 50)]


def test_a_video_longer_than_the_bound_is_refused(session):
    most = session.contract.image_tokens // FRAME
    assert session.processor([film(0, most)]).tokens == (most * FRAME,)
    with pytest.raises(runtime.RuntimeRefusal, match=rf"of {most + 1} frames.*takes {most} .*--image-tokens"):
        session.processor([film(0, most + 1)])


def test_the_published_model_is_planned(tmp_path):
    """Hub page of LanguageBind/Video-LLaVA-7B-hf: 7.37 billion parameters; 8 frames of 257 tokens (Lin et al. 2023)."""
    large.write_config(tmp_path, large.config_of("video-llava-7b"))
    job = Job(str(tmp_path), "", FastV(k=2, r=0.5), max_seq_len=4096, image_tokens=2056)
    prepared = pipeline.prepare(job, tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(7.37, rel=0.005)
    assert prepared.contract.image_tokens == 8 * 257
    assert [group.capacity for group in prepared.contract.groups] == [4096, 4096 - 1028]
