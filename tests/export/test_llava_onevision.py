"""LLaVA-OneVision beyond the common parity test: pictures of many sizes, alone and together, rows, prompts, configs."""

import json

import numpy as np
import pytest
import torch
from tiled_turns import picture, prompt
from transformers import AutoImageProcessor

from vlmtrim import runtime
from vlmtrim.export import cli, pipeline
from vlmtrim.export.families import llava_onevision
from vlmtrim.export.job import Job
from vlmtrim.export.oracles.reference import own_processor, prepared
from vlmtrim.export.oracles.reference_llava_onevision import Reference
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import kept_count
from vlmtrim.runtime import Message, Prompt
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, record
from vlmtrim.runtime.processors import llava_onevision as processors
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

WIDE, SQUARE, TALL, THIN, DOT = (168, 120), (130, 125), (50, 112), (1000, 1), (17, 9)
# Billions of parameters, as the hub shows of each model's files; the matrix of tied ones counts once.
PARAMETERS = {"llava-onevision-0.5b": 0.894, "llava-onevision-7b": 8.03, "llava-onevision-72b": 73.2}


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("onevision", family="llava_onevision", k=2, r=0.5, max_batch=2))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(llava_onevision.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


def parity(session, name, found, expected):
    return Parity(tuple(compare(name, found, expected, [g.layers for g in session.contract.groups], "float32")))


def test_a_large_picture_then_three_of_one_question_then_a_thin_one(session, reference):
    """12 decode steps after each turn, against unpatched transformers and the oracle: resampled, a tile each, squeezed
    alone."""
    opening, middle, closing = (
        (picture(WIDE),),
        (picture(SQUARE, 1), picture(THIN, 2), picture(TALL, 3)),
        (picture(THIN, 4),),
    )
    turns = [
        Turn("large", prompt(session, list(range(40, 52)), *opening), opening),
        Turn("three", prompt(session, list(range(60, 70)), *middle), middle, opens=False),
        Turn("thin", prompt(session, list(range(70, 80)), *closing), closing, opens=False),
    ]
    assert [session.processor(turn.images).tokens for turn in turns] == [(16 + 6 * 10,), (17, 17, 17), (16,)]
    for turn in turns:
        expected, tokens = reference.record(turn, 12)
        found, _ = record(session, turn, tokens)
        assert parity(session, turn.name, found, expected)
        visual = turn.ids.count(session.contract.image_token_id)
        assert len(found.kept) == len(turn.ids) - visual + kept_count(visual, 0.5)


@pytest.mark.parametrize("sizes", [[WIDE], [TALL], [DOT], [(1, 400)], [WIDE, SQUARE, THIN], [DOT, DOT]])
def test_features_are_transformers(bundle, session, reference, sizes):
    """The vision graph's, of pictures alone and together, against the model's own; weights and sums in float32."""
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    found = session.backend.to_host(session.encode_images(session.processor(images)))[0]
    made = AutoImageProcessor.from_pretrained(bundle.folder)([images], return_tensors="pt")
    with torch.no_grad():
        expected = torch.cat(list(reference.model.get_image_features(**made).pooler_output))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("many", [False, True], ids=["one", "two"])
def test_rows_of_a_batch_are_as_if_alone(bundle, reference, many):
    """Each row brings one picture, which is cut into tiles though the batch has two; or two, which are not."""
    one, two = [picture(WIDE), picture(SQUARE, 1)], [picture((84, 60), 2), picture(DOT, 3)]
    images = [one, two] if many else [[picture((112, 56))], [picture((110, 56), 1)]]
    batch = Session(bundle, make_backend("ort-cpu"), batch=2)
    rows = [prompt(batch, list(range(40, 40 + length)), *row) for length, row in zip((7, 25), images, strict=True)]
    prefill = batch.prefill(rows, batch.processor.of_rows(images))
    caches, logits = [batch.cache_contents(row) for row in range(2)], [prefill.logits]
    expected = [reference.record(Turn("row", ids, tuple(row)), 4) for ids, row in zip(rows, images, strict=True)]
    for step in range(4):
        logits.append(batch.decode(np.array([fed[step] for _, fed in expected])))
    assert prefill.visual == (34 if many else 16 + 4 * 9)
    for row, (want, _) in enumerate(expected):
        found = Recording(prefill.kept_indices[row], caches[row], np.stack([step[row] for step in logits]))
        assert parity(batch, f"row {row}", found, want)


def test_a_chat_of_two_rows_takes_each_row_s_pictures_together(bundle):
    chat = runtime.Chat(Session(bundle, make_backend("ort-cpu"), batch=2))
    shown = [[picture(WIDE), picture(DOT, 1)], [picture(TALL, 2), picture(SQUARE, 3)]]
    both = list(chat.generate(["What?", "What else?"], shown, max_new_tokens=4))
    for row, question in enumerate(["What?", "What else?"]):
        alone = runtime.Chat(Session(bundle, make_backend("ort-cpu")))
        steps = list(alone.generate(question, shown[row], max_new_tokens=4))
        assert [step.token_ids[0] for step in steps] == [step.token_ids[row] for step in both]
        assert steps[0].prefill.visual == 34


@pytest.mark.parametrize("sizes", [[WIDE], [WIDE, DOT], [THIN, TALL, SQUARE]])
def test_prompts_of_whole_conversations_are_transformers(bundle, session, sizes):
    """Of one picture, and of several in one message or in several: what serve-vlm prepares, and apply_chat_template."""
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    own, prepare = own_processor(bundle.folder), Preparer(bundle.contract, session.prompter, session.processor)
    one = [Prompt(*map(runtime.Image, images), "What?")]
    several = [Prompt(runtime.Image(image), "This?") for image in images]
    for questions in (one, several):
        messages, turns = [], []
        for question in questions:
            answer = [{"type": "text", "text": "Yes."}]
            messages += [Message("user", question), Message("assistant", "Yes.")]
            turns += [{"role": "user", "content": question.content()}, {"role": "assistant", "content": answer}]
        request = prepare(messages[:-1], 4, None, (), None)
        expected = prepared(own, session.prompter.render(turns[:-1]).text, [images])
        assert list(request.ids) == expected["input_ids"][0].tolist()
        pixels = own.image_processor([images], return_tensors="np", do_pad=False)["pixel_values"]
        found = request.pictures.inputs["pixel_values"]
        np.testing.assert_array_equal(found, np.concatenate(list(pixels)).astype(np.float32))


def test_another_text_model_and_a_tower_with_a_class_token(export_tiny):
    variant = {"text": "llama", "vision": "clip_vision_model", "layers": 3}
    clip = open_bundle(export_tiny("onevision-clip", variant, "llava_onevision", k=1, r=0.25))
    session = Session(clip, make_backend("ort-cpu"))
    images = (picture(WIDE),)
    turn = Turn("clip", prompt(session, list(range(40, 48)), *images), images)
    reference = Reference(llava_onevision.MODEL_CLASS, clip.folder, dict(clip.contract.selection))
    expected, tokens = reference.record(turn, 4)
    found, _ = record(session, turn, tokens)
    assert parity(session, "clip", found, expected)


@pytest.mark.parametrize("like", PARAMETERS)
def test_published_models_are_planned(like, tmp_path):
    """Sizes as the model cards of llava-hf/llava-onevision-qwen2-*-ov-hf say."""
    large.write_config(tmp_path, large.config_of(like))
    prepared = pipeline.prepare(Job(str(tmp_path), "", FastV(k=2, r=0.75), max_seq_len=16384), tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(PARAMETERS[like], rel=0.005)
    assert [group.capacity for group in prepared.contract.groups] == [16384, 16384 - 8829 + round(8829 / 4)]


def test_a_real_config_is_planned(tmp_path, capsys):
    """The 0.5b from its config, cut to 3 layers in both parts."""
    config = large.config_of("llava-onevision-0.5b", layers=3)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--dry-run", "--operators", "--max-seq-len", "16384", "--r", "0.75"]
    assert cli.main(argv) == 0
    printed = "".join(capsys.readouterr())
    assert f"layers 2-2, {16384 - 8829 + round(8829 / 4)} tokens" in printed
    assert "feature_weights      float16   [M, 4]" in printed and "TopK 2" in printed


def film(seed, frames, size=(70, 50)):
    return runtime.Video(tuple(picture(size, seed + number) for number in range(frames)))


@pytest.mark.parametrize("method", ["fastv", "none"])
def test_videos_beside_a_picture_equal_pytorch(method, export_tiny):
    """A video, a picture (alone, and so in tiles) before a video, words; 4 tokens a frame and a newline."""
    bundle = open_bundle(export_tiny("onevision", family="llava_onevision", method=method, max_batch=2))
    session = Session(bundle, make_backend("ort-cpu"))
    reference = Reference(llava_onevision.MODEL_CLASS, bundle.folder, bundle.contract.selection)
    first, second = (film(0, 5),), (picture(WIDE, 9), film(20, 3))
    turns = [
        Turn("film", prompt(session, list(range(40, 52)), *first), first),
        Turn("both", prompt(session, list(range(60, 70)), *second), second, opens=False),
        Turn("words", [70, 71, 72], opens=False),
    ]
    assert [session.processor(turn.images).tokens for turn in turns[:2]] == [(5 * 4 + 1,), (16 + 6 * 10, 3 * 4 + 1)]
    for turn in turns:
        expected, tokens = reference.record(turn, 6)
        found, _ = record(session, turn, tokens)
        assert parity(session, turn.name, found, expected)


def test_tokens_of_frames_are_transformers_at_the_published_size():
    """27 x 27 patches become 14 x 14 tokens: weights equal torch's interpolate to the bit."""
    patches = torch.rand(1, 1, 27, 27, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(patches, size=[14, 14], mode="bilinear")
    index, weights = processors._blended(np.arange(27 * 27).reshape(27, 27), (14, 14))
    found = (patches.numpy().ravel()[index] * weights).sum(1)
    np.testing.assert_allclose(found, expected.numpy().ravel(), atol=2e-7)


def test_frames_of_a_film_are_32_or_what_the_bundle_holds(session):
    most = (session.contract.image_tokens - 1) // 4
    assert most < 32
    assert session.processor.frames(10 * most, 10.0, 2.0).tolist() == list(range(0, 10 * most, 10))
    assert session.processor.frames(3, 10.0, 2.0).tolist() == [0, 1, 2]


def test_a_chat_takes_a_video(bundle):
    chat = runtime.Chat(Session(bundle, make_backend("ort-cpu")))
    question = runtime.Prompt(film(0, 3), "and", runtime.Image(picture(DOT)), "?")
    first = next(iter(chat.generate(question, max_new_tokens=1)))
    assert first.prefill.visual == 3 * 4 + 1 + chat.session.processor([picture(DOT)]).tokens[0]
