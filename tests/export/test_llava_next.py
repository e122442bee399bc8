"""LLaVA-NeXT beyond the common parity test: pictures of many sizes, rows of a batch, towers, engines, real configs."""

import json

import numpy as np
import pytest
from PIL import Image
from tiled_turns import picture, prompt

from vlmtrim.export import cli
from vlmtrim.export.families import llava_next
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.export.weights import large
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import kept_count
from vlmtrim.runtime import cli as run_cli
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, record
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.show import PANEL

WIDE, TALL, SQUARE, THIN = (112, 56), (56, 112), (130, 125), (400, 9)


@pytest.fixture(scope="module")
def next_bundle(export_tiny):
    return open_bundle(export_tiny("next", family="llava_next", k=2, r=0.5, max_batch=2))


def groups_of(session: Session) -> list[tuple[int, ...]]:
    return [group.layers for group in session.contract.groups]


def test_pictures_of_different_sizes_in_one_prompt_and_the_next_turn(next_bundle):
    """Three pictures, then one more: 32 decode steps after each turn, against unpatched transformers and the oracle."""
    reference = Reference(llava_next.MODEL_CLASS, next_bundle.folder, dict(next_bundle.contract.selection))
    session = Session(next_bundle, make_backend("ort-cpu"))
    opening = (picture(WIDE), picture(SQUARE, 1), picture(THIN, 2))
    closing = picture(TALL, 3)
    turns = [
        Turn("three", prompt(session, list(range(40, 52)), *opening), opening),
        Turn("one more", prompt(session, list(range(60, 70)), closing), (closing,), opens=False),
    ]
    assert session.processor(opening).tokens == (16 + 4 * 9, 16 + 8 * 9, 16)
    for turn in turns:
        expected, tokens = reference.record(turn, 32)
        found, _ = record(session, turn, tokens)
        assert Parity(tuple(compare(turn.name, found, expected, groups_of(session), "float32")))
        visual = turn.ids.count(session.contract.image_token_id)
        assert len(found.kept) == len(turn.ids) - visual + kept_count(visual, 0.5)


def test_rows_of_a_batch_with_the_same_number_of_visual_tokens(next_bundle):
    """The pictures of the rows differ in size and order, the prompts in length; each row as if alone."""
    reference = Reference(llava_next.MODEL_CLASS, next_bundle.folder, dict(next_bundle.contract.selection))
    session = Session(next_bundle, make_backend("ort-cpu"), batch=2)
    images = [(picture(WIDE), picture(TALL, 1)), (picture(TALL, 2), picture(WIDE, 3))]
    rows = [prompt(session, list(range(40, 40 + length)), *row) for length, row in zip((7, 25), images, strict=True)]
    prefill = session.prefill(rows, session.processor([image for row in images for image in row]))
    caches = [session.cache_contents(row) for row in range(2)]
    logits = [prefill.logits]
    expected = [reference.record(Turn("row", ids, row), 8) for ids, row in zip(rows, images, strict=True)]
    for step in range(8):
        logits.append(session.decode(np.array([fed[step] for _, fed in expected])))
    assert prefill.visual == 16 + 4 * 9 + 16 + 8 * 5
    for row, (want, _) in enumerate(expected):
        found = Recording(prefill.kept_indices[row], caches[row], np.stack([step[row] for step in logits]))
        assert Parity(tuple(compare("row", found, want, groups_of(session), "float32")))


def test_the_kept_tokens_are_drawn_on_the_picture_and_its_tiles(next_bundle, tmp_path, capsys):
    picture(WIDE).save(tmp_path / "wide.png")
    argv = [str(next_bundle.folder), "--image", str(tmp_path / "wide.png"), "--prompt", "Hi?", "--max-new-tokens", "1"]
    assert run_cli.main([*argv, "--show-kept", str(tmp_path / "kept.png")]) == 0
    with Image.open(tmp_path / "kept.png") as drawing:
        assert drawing.height >= 2 * PANEL


def test_another_text_model_and_a_tower_without_class_token(export_tiny):
    variant = {"text": "mistral", "vision": "siglip_vision_model", "layers": 3}
    bundle = open_bundle(export_tiny("next-mistral", variant, "llava_next", k=1, r=0.25))
    reference = Reference(llava_next.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    session = Session(bundle, make_backend("ort-cpu"))
    images = (picture(SQUARE), picture(TALL, 1))
    turn = Turn("mistral", prompt(session, list(range(40, 48)), *images), images)
    expected, tokens = reference.record(turn, 8)
    found, _ = record(session, turn, tokens)
    assert Parity(tuple(compare("mistral", found, expected, groups_of(session), "float32")))


def test_the_vision_profile_counts_tiles(export_tiny):
    contract = open_bundle(export_tiny("next-profiles", None, "llava_next", max_batch=2)).contract
    tiles = profiles.vision_profiles(contract)["images"]["T"]
    assert (tiles.min, tiles.opt, tiles.max) == (2, 20, 100)


def test_a_real_config_is_planned(tmp_path, capsys):
    """LLaVA-1.6-Mistral-7B from its config, cut to 3 layers: 2928 visual tokens a picture, caches for two of them."""
    config = large.config_of("llava-next-mistral-7b", layers=3)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    argv = ["--model", str(tmp_path), "--dry-run", "--operators"]
    argv += ["--max-seq-len", "16384", "--images", "2", "--r", "0.75"]
    assert cli.main(argv) == 0
    printed = "".join(capsys.readouterr())
    assert f"layers 2-2, {16384 - 5856 + 1464} tokens" in printed
    assert "feature_index" in printed and "TopK 2" in printed
