"""SmolVLM and Idefics3 beyond what every family is tested for: the tower, words between tiles, batches, sizes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from alone import answer_alone, assert_same
from transformers import SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionEmbeddings

from vlmtrim import runtime
from vlmtrim.export import cli, pipeline
from vlmtrim.export.check_cli import _asked, generated_picture
from vlmtrim.export.families import idefics3, smolvlm
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.oracles import reference as references
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.export.tracing import smol_vlm
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.generate import process
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, record
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

WIDE, TALL, SQUARE, THIN = (112, 56), (56, 112), (130, 125), (400, 9)
# Billions of parameters, as the hub shows of each model's files.
PARAMETERS = {"smolvlm2-256m": 0.256, "smolvlm2-500m": 0.507, "smolvlm2-2.2b": 2.25, "idefics3-8b": 8.46}


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("smol", family="smolvlm", k=2, r=0.5, max_batch=2, max_seq_len=1024))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(smolvlm.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


def sized(size, seed=0):
    return generated_picture(seed).resize(size)


def assert_parity(session, reference, turn, steps=8):
    expected, tokens = reference.record(turn, steps)
    found, _ = record(session, turn, tokens)
    groups = [group.layers for group in session.contract.groups]
    assert Parity(tuple(compare(turn.name, found, expected, groups, "float32")))


@pytest.mark.parametrize("side", [4, 19, 25, 26, 27, 32, 41, 70])
def test_places_are_transformers_to_the_bit(side):
    """Of full squares; float32 puts some patches of four of these a place early."""
    embeddings = SmolVLMVisionEmbeddings(SmolVLMVisionConfig(hidden_size=1, image_size=2 * side, patch_size=2))
    with torch.no_grad():
        for parameter in embeddings.patch_embedding.parameters():
            parameter.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        found = embeddings(torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
    assert found.flatten().long().tolist() == smol_vlm.places(side).tolist()


def test_the_tower_is_transformers(session, reference):
    images = [sized(SQUARE), sized(THIN, 1), sized(TALL, 2)]
    pictures = session.processor(images)
    found = session.backend.to_host(session.encode_images(pictures))[0]
    with torch.no_grad():
        made = reference.model.get_image_features(**reference._image_processor(images, return_tensors="pt"))
    np.testing.assert_allclose(found, torch.cat(made.pooler_output).numpy(), atol=1e-5)


def test_pictures_of_different_sizes_in_three_turns(session, reference):
    """Rows and columns in words between the tiles' tokens, three pictures at once, then one more, then none."""
    talk = Conversation(session.prompter)
    for number, images in enumerate([(sized(WIDE), sized(SQUARE, 1), sized(THIN, 2)), (sized(TALL, 3),), ()]):
        ids = _asked(session, talk, "What are they?", images)
        assert_parity(session, reference, Turn(str(number), ids, images, opens=not number))
        talk.answer("")


def test_rows_of_a_batch_with_the_same_number_of_visual_tokens(bundle, session, reference):
    """Pictures differ in size and order, questions in length; each row as if alone."""
    images = [(sized(WIDE), sized(TALL, 1)), (sized(TALL, 2), sized(WIDE, 3))]
    asked = zip(("Hm?", "Which one is taller?"), images, strict=True)
    rows = [_asked(session, Conversation(session.prompter), question, row) for question, row in asked]
    batch = Session(bundle, make_backend("ort-cpu"), batch=2)
    prefill = batch.prefill(rows, batch.processor([image for row in images for image in row]))
    caches, logits = [batch.cache_contents(row) for row in range(2)], [prefill.logits]
    expected = [reference.record(Turn("row", ids, row), 4) for ids, row in zip(rows, images, strict=True)]
    for step in range(4):
        logits.append(batch.decode(np.array([fed[step] for _, fed in expected])))
    groups = [group.layers for group in bundle.contract.groups]
    for row, (want, _) in enumerate(expected):
        found = Recording(prefill.kept_indices[row], caches[row], np.stack([step[row] for step in logits]))
        assert Parity(tuple(compare("row", found, want, groups, "float32")))


def test_slots_prepare_the_words_of_pictures(bundle, session):
    """Two requests side by side, of two pictures and of one, say what each says alone."""
    with runtime.Engine(bundle, make_backend("ort-cpu")) as engine:
        asked = []
        for seeds in ((0, 1), (2,)):
            shown = [runtime.Image(sized(SQUARE if seed else WIDE, seed)) for seed in seeds]
            asked.append(engine.prepare([runtime.Message("user", runtime.Prompt("Say", *shown))], max_new_tokens=6))
        answers = [(request, engine.submit(request)) for request in asked]
        for request, answer in answers:
            assert_same(list(answer), answer_alone(session, request))


def test_one_matrix_for_embedding_and_head_and_another_layout(export_tiny):
    """Tied, three layers, as many key and value heads; pruned before the last layer."""
    variant = {"layers": 3, "heads": 3, "kv_heads": 3, "tied": True}
    bundle = open_bundle(export_tiny("smol-tied", variant, "idefics3", k=1, r=0.75))
    reference = Reference(idefics3.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    assert reference.model.lm_head.weight is reference.model.get_input_embeddings().weight
    session = Session(bundle, make_backend("ort-cpu"))
    images = (sized(TALL),)
    ids = _asked(session, Conversation(session.prompter), "What?", images)
    assert_parity(session, reference, Turn("tied", ids, images))


def test_idefics3_takes_no_videos(bundle):
    """Its processor in transformers has none either."""
    ours = load_processor(bundle.files, dataclasses.replace(bundle.contract, family="idefics3"))
    with pytest.raises(runtime.RuntimeRefusal, match="of idefics3 take no videos"):
        process(ours, [runtime.Video([sized(SQUARE)])])
    with pytest.raises(runtime.RuntimeRefusal, match="of idefics3 take no videos"):
        ours.frames(10, 1.0, 1.0)


def test_a_processor_that_transformers_cannot_make_is_refused(bundle, monkeypatch):
    """It wants a package for videos, which not everyone has."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(Refusal, match="num2words"):
        references.own_processor(bundle.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale_factor": 3}, "scale_factor 3 does not divide the 4 x 4 patches"),
        ({"scale_factor": 0}, "scale_factor 0 does not divide"),
        ({"vision_config": {"image_size": [56, 56], "patch_size": 14}}, r"image_size is \[56, 56\], patch_size 14"),
        ({"text_config": {"model_type": "qwen2"}}, "the text model is 'qwen2'"),
        ({"image_token_id": 272}, "image_token_id 272 lies outside"),
    ],
)
def test_configs_that_are_not_exported_are_refused(change, said):
    with pytest.raises(Refusal, match=said):
        smolvlm.read_shape(SmolVLMConfig(**{**smol_vlm.tiny_settings(4, 2, 4, False), **change}))


@pytest.mark.parametrize("like", PARAMETERS)
def test_published_models_are_planned(like, tmp_path):
    """Sizes as the model cards say; caches of two layers whole, of the others pruned; 17 tiles a picture."""
    large.write_config(tmp_path, large.config_of(like))
    prepared = pipeline.prepare(Job(str(tmp_path), "", FastV(k=2, r=0.75), max_seq_len=8192), tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(PARAMETERS[like], rel=0.005)
    visual = prepared.contract.image_tokens
    assert visual == 17 * {"idefics3-8b": 169, "smolvlm2-2.2b": 81}.get(like, 64)
    assert [group.capacity for group in prepared.contract.groups] == [8192, 8192 - visual + round(visual / 4)]


def test_a_real_config_is_traced(tmp_path, capsys):
    """SmolVLM2-2.2B, cut to 3 layers of each: 27 patches a side, nine of which become a token."""
    config = large.config_of("smolvlm2-2.2b", layers=3)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["--model", str(tmp_path), "--dry-run", "--operators", "--max-seq-len", "4096"]) == 0
    assert "TopK" in "".join(capsys.readouterr())
