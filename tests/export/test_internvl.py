"""InternVL beyond what every family is tested for: conversations, batches, the large tower, dynamic RoPE, engines."""

import json

import pytest
import torch
from qwen_turns import assert_rows, assert_turns, sized

from vlmtrim import runtime
from vlmtrim.export import check_cli, cli, pipeline
from vlmtrim.export.families import internvl
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.oracles.reference_internvl import Reference
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.export.weights import StoredTensor, large, match_parameters, tiny
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.request import Preparer

IMAGE = 262


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return open_bundle(export_tiny("internvl", family="internvl", k=2, r=0.5, max_batch=2, images=4, image_tokens=52))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(internvl.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


def prompt(session, *parts):
    """Words and pictures -> ids, a picture's tokens between its marks, and the pictures."""
    ids, images = [256], tuple(part for part in parts if not isinstance(part, list))
    tokens = iter(session.processor(images).tokens if images else ())
    for part in parts:
        ids += part if isinstance(part, list) else [260, *[IMAGE] * next(tokens), 261]
    return ids, images


def test_pictures_of_other_sizes_in_three_turns(session, reference):
    turns = [
        prompt(session, [1, 2], sized(240, 200, 1), [3], sized(17, 9, 2), sized(1, 1000, 3), [4, 5, 6]),
        prompt(session, [7], sized(56, 56, 4), [8, 9]),
        prompt(session, [10, 11, 12]),
    ]
    assert_turns(session, reference, turns)


def test_rows_of_a_batch_equal_single_runs(session, reference):
    assert_rows(session, reference, sized(168, 56, 1), sized(56, 56, 2), prompt)


def test_a_prompt_with_pictures_is_what_transformers_makes_of_it(bundle, session, reference):
    """Two pictures where the question puts them, for a chat and for a server's slots."""
    first, second = sized(240, 200), sized(30, 80, 1)
    asked = runtime.Prompt("What is in ", runtime.Image(first), " and not in ", runtime.Image(second), "?")
    text = "USER: What is in  <IMG_CONTEXT>\n and not in  <IMG_CONTEXT>\n? ASSISTANT:"
    expected = reference._processor(text=text, images=[first, second])["input_ids"][0]
    pictures = session.processor([first, second])
    ids = Conversation(session.prompter).ask(asked.content(), 2, words=pictures.words)
    assert session.prompter.expand_images(ids, pictures.tokens, pictures.words) == expected
    prepare = Preparer(bundle.contract, session.prompter, session.processor)
    request = prepare([runtime.Message("user", asked)], 1, None, (), None)
    assert list(request.ids) == expected and expected.count(IMAGE) == request.visual > 52


def test_the_large_tower_and_qwen3(export_tiny, capsys):
    """RMS norms, norms of queries and keys, no biases; heads of Qwen3 are normed."""
    folder = export_tiny("internvl-large", {"text": "qwen3", "large": True}, "internvl", k=1, r=0.25)
    assert check_cli.main([str(folder), "--tokens", "8"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("score", ["cells", "topv"])
def test_pictures_of_one_tile_lie_on_its_grid(score, export_tiny, capsys):
    """So scores that need to know where tokens lie are exported: 2 x 2 tokens of 4 x 4 patches."""
    folder = export_tiny("internvl-tile", family="internvl", image_tokens=4, score=score)
    assert check_cli.main([str(folder), "--tokens", "4"]) == 0


def test_dynamic_rope_is_plain_within_its_limit(tmp_path, capsys):
    """As the hub's configs have it, which say nothing of a tied head beside the head that they store."""
    source = tiny.write_checkpoint(internvl, tmp_path / "checkpoint")
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    for key in ("rope_parameters", "tie_word_embeddings"):
        text.pop(key, None)
    del config["tie_word_embeddings"]
    config["text_config"] = {**text, "rope_theta": 1e6, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (source / "config.json").write_text(json.dumps(config))
    folder = pipeline.export(Job(str(source), str(tmp_path / "b"), FastV(k=2, r=0.5), max_seq_len=1024), source)
    assert check_cli.main([str(folder), "--tokens", "8"]) == 0
    with pytest.raises(Refusal, match="--max-seq-len is 1025; the model takes 2 to 1024"):
        pipeline.prepare(Job(str(source), "", None, max_seq_len=1025), source, None)


def test_the_vision_profile_counts_tiles(bundle):
    tiles = profiles.vision_profiles(bundle.contract)["images"]["T"]
    assert (tiles.min, tiles.opt, tiles.max) == (1, 4 * 13 * 2, 9 * 13 * 2)


def test_the_hubs_names_are_known():
    model = trace.build_without_memory(internvl.MODEL_CLASS, internvl.tiny_config(), torch.float32, IMPLEMENTATION)
    old = {}
    for name, _ in model.named_parameters():
        old[name] = next((o + name.removeprefix(n) for n, o in internvl.OLD_NAMES if name.startswith(n)), name)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old.values()
    assert all(name != renamed for name, renamed in old.items())
    stored = {
        old[name]: StoredTensor(None, "F32", tuple(value.shape), 0, 0) for name, value in model.named_parameters()
    }
    assert match_parameters(model, stored) == old


def test_a_real_config_is_planned(tmp_path, capsys):
    """InternVL3-8B cut to 3 layers: 13 tiles of 256 tokens a picture, or fewer where the caches are small."""
    config = large.config_of("internvl3-8b", layers=3)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--dry-run", "--r", "0.75", "--max-seq-len"]
    assert cli.main([*argv, "8192", "--operators"]) == 0
    assert f"layers 2-2, {8192 - 3328 + 832} tokens" in "".join(capsys.readouterr())
    assert cli.main([*argv, "2048"]) == 0
    assert f"layers 2-2, {2048 - 1024 + 256} tokens" in "".join(capsys.readouterr())
