"""Gemma 3 beyond what every family is tested for: masks against transformers' own, windows, prompts, sizes."""

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qwen_turns import assert_rows, assert_turns, sized
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlmtrim import runtime
from vlmtrim.export import check_cli, cli, pipeline
from vlmtrim.export.families import gemma3
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.oracles import mask
from vlmtrim.export.oracles.reference import own_processor
from vlmtrim.export.oracles.reference_gemma3 import Reference
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.export.weights import StoredTensor, large, layerwise, match_parameters
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.tidal import Tidal
from vlmtrim.graphs.methods.zipvl import ZipVL
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

TURN, END, START, STOP, IMAGE = 259, 260, 261, 262, 263  # marks of turns and pictures, and a picture's token
# Billions of parameters, as the hub shows of each model's files; the tied matrix counts once.
PARAMETERS = {"gemma3-4b": 4.3, "gemma3-12b": 12.2, "gemma3-27b": 27.4}


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("gemma", family="gemma3", k=2, r=0.5, max_batch=2, images=4))


@pytest.fixture(scope="module")
def dense(export_tiny):
    return open_bundle(export_tiny("gemma-dense", family="gemma3", method="none", images=4))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(gemma3.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


def prompt(session, *parts):
    """Words and pictures -> ids, a picture's tokens between its marks, and the pictures."""
    ids, images = [256], tuple(part for part in parts if not isinstance(part, list))
    for part in parts:
        ids += part if isinstance(part, list) else [START, *[IMAGE] * 16, STOP]
    return ids, images


def test_transformers_forward_untouched_gives_the_same_logits(dense):
    """Two pictures, one of them behind the window of 24 entries, and an answer: masks and caches are its own."""
    own = Session(dense, make_backend("ort-cpu"))
    ids, images = prompt(own, [1, 2], sized(240, 200, 1), list(range(3, 40)), sized(17, 90, 2), [4, 5, 6])
    found = [own.prefill([ids], own.processor(images)).logits[0]]
    model = Gemma3ForConditionalGeneration.from_pretrained(dense.folder, attn_implementation="eager").eval()
    given, kinds = torch.tensor([ids]), (torch.tensor([ids]) == IMAGE).long()
    pixels = torch.from_numpy(own.processor(images).inputs["pixel_values"])
    with torch.no_grad():
        output = model(input_ids=given, pixel_values=pixels, token_type_ids=kinds)
        expected = [output.logits[0, -1]]
        for _ in range(8):
            token = int(expected[-1].argmax())
            found.append(own.decode(np.array([token]))[0])
            given = torch.cat([given, torch.tensor([[token]])], 1)
            kinds = torch.cat([kinds, torch.zeros(1, 1, dtype=torch.int64)], 1)
            expected.append(model(input_ids=given, pixel_values=pixels, token_type_ids=kinds).logits[0, -1])
        causal = model(input_ids=given, pixel_values=pixels).logits[0, -1]
    np.testing.assert_allclose(np.stack(found), torch.stack(expected).numpy(), atol=1e-4)
    assert not torch.allclose(causal, expected[-1], atol=1e-2), "what a picture's tokens see ahead changes nothing"


def test_the_oracles_masks_are_those_of_the_paper(reference):
    """A picture of three tokens at positions 2 to 4, of which the second is gone, behind 30 entries."""
    reference._form.pictures = {2: 7, 3: 7, 4: 7}
    positions = torch.tensor([[0, 1, 2, 4, 5]])
    full = mask(reference._text, 1, positions, 30)[0, 0] == 0
    assert full.sum(1).tolist() == [31, 32, 34, 34, 35]
    near = mask(reference._text, 0, positions, 30)[0, 0] == 0
    assert near.sum(1).tolist() == [24, 24, 25, 24, 24]
    assert near[2].nonzero()[:, 0].tolist() == list(range(9, 34)), "32 is its own slot, 33 that of the picture's last"


def test_pictures_of_other_sizes_in_three_turns(session, reference):
    turns = [
        prompt(session, [1, 2], sized(240, 200, 1), [3], sized(17, 9, 2), sized(1, 1000, 3), [4, 5, 6]),
        prompt(session, [7], sized(3000, 1700, 4), [8, 9]),
        prompt(session, [10, 11, 12]),
    ]
    assert_turns(session, reference, turns)


def test_pictures_side_by_side_are_one(session, reference):
    """As in transformers, where tokens of pictures with nothing between them attend to each other."""
    images = sized(240, 200, 1), sized(90, 90, 2)
    assert_turns(session, reference, [([256, 5, *[IMAGE] * 32, 6, 7], images)])


def test_rows_of_a_batch_equal_single_runs(session, reference):
    assert_rows(session, reference, sized(168, 56, 1), sized(56, 56, 2), prompt)


@pytest.mark.parametrize(
    ("k", "score", "every"),
    [
        (3, "last-row", 3),
        pytest.param(2, "no-rope", 3, marks=pytest.mark.slow),
        pytest.param(1, "own-row", 2, marks=pytest.mark.slow),
    ],
)
def test_layers_of_both_kinds_score(k, score, every, export_tiny, capsys):
    """A layer that sees all before the selection or behind it, and the last one of either kind."""
    variant = {} if every == 2 else {"every": every}
    folder = export_tiny("gemma-score", variant, "gemma3", k=k, score=score)
    assert check_cli.main([str(folder), "--tokens", "8"]) == 0


def test_a_prompt_is_what_transformers_makes_of_it(bundle, session, reference):
    """Two pictures where the question puts them, behind a system text; for a chat and for a server's slots."""
    first, second = sized(240, 200), sized(30, 80, 1)
    asked = runtime.Prompt("What is in ", runtime.Image(first), " and not in ", runtime.Image(second), "?")
    text = "<s><start_of_turn>user\nBe brief.\n\nWhat is in<start_of_image>and not in<start_of_image>?<end_of_turn>\n"
    text += "<start_of_turn>model\n"
    made = own_processor(bundle.folder)(text=text, images=[first, second], add_special_tokens=False)
    expected = made["input_ids"][0]
    pictures = session.processor([first, second])
    ids = Conversation(session.prompter, "Be brief.").ask(asked.content(), 2, words=pictures.words)
    assert session.prompter.expand_images(ids, pictures.tokens, pictures.words) == expected
    prepare = Preparer(bundle.contract, session.prompter, session.processor)
    messages = [runtime.Message("system", "Be brief."), runtime.Message("user", asked)]
    request = prepare(messages, 1, None, (), None)
    assert list(request.ids) == expected and expected.count(IMAGE) == request.visual == 32
    assert [expected.count(mark) for mark in (TURN, END, START, STOP)] == [2, 1, 2, 2]


def test_answers_end_with_a_turn_or_the_text(bundle):
    assert bundle.contract.eos_token_ids == (257, 260)


def test_methods_that_do_not_go_with_it_are_refused(dense, capsys):
    for name, why in (("tidal", "see a window alone"), ("zipvl", "attend to each other both ways")):
        assert cli.main(["--model", "tiny:gemma3", "--method", name, "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert why in said and "give --method fastv or guided or pyramid or none" in said
    for method, why in ((Tidal(9, (0, 2)), "under masks of several kinds"), (ZipVL(), "attend to later ones")):
        with pytest.raises(ValueError, match=why):
            method(ir.load(dense.folder / "decoder.onnx"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_tokens_per_image": 15}, "mm_tokens_per_image is 15; give the square of a number"),
        ({"mm_tokens_per_image": 9}, "that divides 8 patches a side"),
        ({"image_token_index": 5000}, "image_token_id 5000 lies outside the vocabulary of 272"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "the vision tower is 'clip_vision_model'"),
    ],
)
def test_a_config_that_is_not_exported_is_refused(change, said):
    changed = Gemma3Config.from_dict({**gemma3.tiny_config().to_dict(), **change})
    with pytest.raises(Refusal, match=said):
        gemma3.read_shape(changed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "full_attention is 'dynamic'",
        ),
    ],
)
def test_a_text_model_that_is_not_exported_is_refused(text, said):
    config = gemma3.tiny_config().to_dict()
    with pytest.raises(Refusal, match=said):
        gemma3.read_shape(Gemma3Config.from_dict({**config, "text_config": {**config["text_config"], **text}}))


def test_pan_and_scan_is_turned_off_in_the_bundle(bundle, tmp_path, capsys):
    settings = {"size": {"height": 112, "width": 112}, "do_pan_and_scan": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    gemma3.adapt_settings(tmp_path, bundle.contract)
    assert "give crops as further pictures" in capsys.readouterr().err
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_pan_and_scan"] is False


def test_calibration_passes_states_through_layers_of_both_kinds(dense):
    """Each under its own mask and tables, as the model's own forward has them."""
    model: Any = Gemma3ForConditionalGeneration.from_pretrained(dense.folder).eval()
    text = "<start_of_image>" + "What is this? " * 3
    given = dict(own_processor(dense.folder)(text=text, images=sized(240, 200), return_tensors="pt"))
    with torch.no_grad():
        expected = model.model(**given, output_hidden_states=True, use_cache=False).hidden_states
        layers = model.get_decoder().layers
        states = [layerwise._entering(model, layers, given)]
        for index, layer in enumerate(layers[:3]):
            torch.testing.assert_close(states[0][0], expected[index])
            states, _ = layerwise._passed(layer, index, states)
    torch.testing.assert_close(states[0][0], expected[3])


def test_videos_are_refused(session):
    with pytest.raises(runtime.RuntimeRefusal, match="take no videos"):
        runtime.Chat(session).generate("?", [runtime.Video([sized(96, 96)])])


def test_the_hubs_names_are_known():
    model = trace.build_without_memory(gemma3.MODEL_CLASS, gemma3.tiny_config(), torch.float32, IMPLEMENTATION)
    old = {}
    for name, _ in model.named_parameters():
        if name == "lm_head.weight":  # tied, and stored once
            continue
        old[name] = next((o + name.removeprefix(n) for n, o in gemma3.OLD_NAMES if name.startswith(n)), name)
    assert {"language_model.model.norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"} <= set(old.values())
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    stored = {renamed: StoredTensor(None, "F32", shapes[name], 0, 0) for name, renamed in old.items()}
    matched = match_parameters(model, stored)
    assert matched.pop("lm_head.weight") == old["model.language_model.embed_tokens.weight"]
    assert matched == old


@pytest.mark.parametrize("like", PARAMETERS)
def test_parameters_are_those_of_the_published_model(like, tmp_path):
    large.write_config(tmp_path, large.config_of(like))
    prepared = pipeline.prepare(Job(str(tmp_path), "", FastV(), max_seq_len=4096), tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(PARAMETERS[like], rel=0.005)
    kinds = prepared.config.text_config.layer_types
    assert [kind == "full_attention" for kind in kinds[:12]] == [False] * 5 + [True] + [False] * 5 + [True]
    assert prepared.contract.image_grid == (16, 16) and prepared.contract.max_images == 16


def test_a_real_config_is_planned(tmp_path, capsys):
    """Gemma 3 4B cut to 7 layers, one of which sees all: longer than the window, and with the real decoder's shapes."""
    config = large.config_of("gemma3-4b", layers=7)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--dry-run", "--k", "6", "--r", "0.75", "--max-seq-len", "8192", "--operators"]
    assert cli.main(argv) == 0
    assert f"layers 6-6, {8192 - 192} tokens" in "".join(capsys.readouterr())
