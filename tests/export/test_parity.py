"""Bundles against the unpatched Hugging Face model and an independent oracle: text models, towers, head layouts."""

import numpy as np
import pytest
from parity import assert_parity

from vlmtrim.export import check_cli
from vlmtrim.export.families import llava
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Parity, Recording, Row, Turn, compare, record
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

VARIANTS = {
    "llama-gqa-clip": ({}, {"k": 2, "r": 0.5, "max_batch": 2}),
    "llama-mha-clip-k0": ({"kv_heads": 4}, {"k": 0, "r": 0.5, "seed": 5}),
    "qwen2-mha-siglip": ({"text": "qwen2", "vision": "siglip_vision_model", "kv_heads": 4}, {"k": 1, "r": 0.75}),
    "mistral-gqa-siglip": ({"text": "mistral", "vision": "siglip_vision_model"}, {"k": 3, "r": 0.25}),
    "llama-gqa-no-rope": ({}, {"k": 2, "r": 0.5, "score": "no-rope"}),
    "qwen2-gqa-coverage": ({"text": "qwen2"}, {"k": 1, "r": 0.5, "score": "coverage"}),
    "llama-gqa-stride": ({}, {"k": 2, "r": 0.25, "score": "stride", "seed": 3}),
    "llama-gqa-random": ({}, {"k": 3, "r": 0.75, "score": "random", "seed": 7}),
    "qwen3-gqa-no-rope": ({"text": "qwen3"}, {"k": 1, "r": 0.5, "score": "no-rope"}),
    "qwen2-gqa-clip-dense": ({"text": "qwen2"}, {"method": "none"}),
}


@pytest.fixture(params=VARIANTS)
def bundle(request, export_tiny, fastv_bundle):
    variant, fields = VARIANTS[request.param]
    return fastv_bundle if request.param == "llama-gqa-clip" else export_tiny(request.param, variant, **fields)


def test_prefill_decode_and_second_turn_equal_pytorch(bundle, capsys):
    """Kept sets, caches of every layer, logits within 1e-4, 32 greedy tokens; three turns."""
    assert_parity(bundle, capsys)


def test_rows_of_a_batch_equal_single_runs(fastv_bundle):
    """Prompts of different lengths, a picture each at different places, padded on the right: each row as if alone."""
    bundle = open_bundle(fastv_bundle)
    reference = Reference(llava.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    session = Session(bundle, make_backend("ort-cpu"), batch=2)
    random, image = np.random.default_rng(0), [bundle.contract.image_token_id] * bundle.contract.image_tokens
    text = random.integers(0, 250, 40).tolist()
    rows = [[256, *text[:3], *image, *text[3:9]], [256, *text[9:20], *image, *text[20:40]]]
    images = (generated_picture(0), generated_picture(1))
    prefill = session.prefill(rows, session.processor(images))
    caches = [session.cache_contents(row) for row in range(2)]
    logits = [prefill.logits]
    expected = [reference.record(Turn("row", rows[row], images[row : row + 1]), 8) for row in range(2)]
    for step in range(8):
        logits.append(session.decode(np.array([fed[step] for _, fed in expected])))
    groups = [group.layers for group in bundle.contract.groups]
    for row, (want, _) in enumerate(expected):
        found = Recording(prefill.kept_indices[row], caches[row], np.stack([step[row] for step in logits]))
        assert Parity(tuple(compare("row", found, want, groups, "float32")))


def test_several_images_in_one_prompt(fastv_bundle):
    bundle = open_bundle(fastv_bundle)
    reference = Reference(llava.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    session = Session(bundle, make_backend("ort-cpu"))
    image = [bundle.contract.image_token_id] * bundle.contract.image_tokens
    ids = [256, 5, *image, 6, 7, 8, *image, *image, 9, 10]
    turn = Turn("three", ids, tuple(generated_picture(seed) for seed in range(3)))
    expected, tokens = reference.record(turn, 4)
    found, _ = record(session, turn, tokens)
    assert len(found.kept) == len(ids) - 24
    assert Parity(tuple(compare("three", found, expected, [g.layers for g in bundle.contract.groups], "float32")))


def test_the_reference_without_removal_is_the_plain_forward(dense_bundle):
    """The oracle's own layer loop at r = 0 equals transformers' forward."""
    turn = Turn("t", [256, *[259] * 16, 40, 41], (generated_picture(0),))
    plain, tokens = Reference(llava.MODEL_CLASS, dense_bundle, None).record(turn, 4)
    looped, same = Reference(
        llava.MODEL_CLASS, dense_bundle, {"method": "fastv", "k": 2, "r": 0.0, "seed": 0, "score": "last-row"}
    ).record(turn, 4)
    assert tokens == same
    np.testing.assert_allclose(looped.logits, plain.logits, atol=1e-5)


def test_a_wrong_bundle_fails_the_check(fastv_bundle, tmp_path, capsys, monkeypatch):
    """Judged by another k, the same bundle must fail with exit status 1, and say what would have passed."""
    real = check_cli.open_bundle

    def other_selection(folder):
        bundle = real(folder)
        selection = {**bundle.contract.selection, "r": 0.75}
        object.__setattr__(bundle.contract, "selection", selection)
        return bundle

    monkeypatch.setattr(check_cli, "open_bundle", other_selection)
    assert check_cli.main([str(fastv_bundle), "--tokens", "2"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_failed_row_says_the_tolerance_that_would_pass():
    recording = Recording(None, [], np.array([[1.0, 2.0]], np.float32))
    shifted = Recording(None, [], np.array([[1.0, 2.5]], np.float32))
    parity = Parity(tuple(compare("t", shifted, recording, [], "float32")))
    assert not parity and "would pass at 0.25" in parity.table()
    assert Parity((Row("t", "x", 0.0, 1.0, True),))


def test_float16_bundle_is_within_its_tolerance(export_tiny, capsys):
    assert check_cli.main([str(export_tiny("half", k=2, r=0.5, dtype="float16")), "--tokens", "8"]) == 0
