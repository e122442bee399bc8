"""Qwen3-VL beyond what every family is tested for: the tower, pictures of other sizes, batches, DeepStack, a chain."""

import numpy as np
import pytest
import torch
from qwen_turns import IMAGE, assert_rows, assert_turns, prompt, sized
from transformers import AutoImageProcessor, Qwen3VLModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vlmtrim import runtime
from vlmtrim.export import pipeline
from vlmtrim.export.families import qwen3_vl
from vlmtrim.export.job import Job
from vlmtrim.export.oracles import ADDS
from vlmtrim.export.oracles.reference_qwen3_vl import Reference
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.measure.check import Turn
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

SIZES = [(240, 200), (64, 300), (300, 31), (9, 12), (1400, 1000), (96, 96)]  # width, height
# Billions of parameters, as the hub shows of each model's files; the matrix of tied ones counts once.
PARAMETERS = {"qwen3-vl-2b": 2.13, "qwen3-vl-4b": 4.44, "qwen3-vl-8b": 8.77, "qwen3-vl-32b": 33.4}


@pytest.fixture(scope="module", params=[1, 2], ids=["k1", "k2"])
def bundle(request, export_tiny):
    """Features are added behind layers 0 and 1: a selection lies between them, or behind both."""
    return open_bundle(export_tiny("qwen3", family="qwen3_vl", max_batch=2, images=4, k=request.param))


@pytest.fixture(scope="module")
def reference(bundle):
    return Reference(qwen3_vl.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, make_backend("ort-cpu"))


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_transformers(bundle, session, size):
    expected = AutoImageProcessor.from_pretrained(bundle.folder)(sized(*size), return_tensors="np")
    found = session.processor([sized(*size)])
    patches = found.inputs["pixel_values"].reshape(expected["pixel_values"].shape)
    np.testing.assert_array_equal(patches, expected["pixel_values"])
    _, high, wide = expected["image_grid_thw"][0]
    assert found.tokens == (high * wide // 4,) and found.grids == ((high // 2, wide // 2, 0),)


def test_places_and_corners_are_transformers_to_the_bit(bundle, session):
    found = session.processor([sized(*size) for size in SIZES[:3]])
    grids = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns, _ in found.grids])
    np.testing.assert_array_equal(found.inputs["patch_positions"].reshape(-1, 2), get_vision_position_ids(grids, 2))
    index, weights = get_vision_interpolation_indices_and_weights(
        grids, 6, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(found.inputs["grid_index"].reshape(-1, 4), index)
    np.testing.assert_array_equal(found.inputs["grid_weights"].reshape(-1, 4), weights)


def test_the_tower_is_transformers(session, reference):
    """Features of three pictures in one call, and of both layers that DeepStack takes."""
    pictures = session.processor([sized(240, 200, 1), sized(64, 300, 2), sized(96, 96, 3)])
    found = session.backend.to_host(session.encode_images(pictures))[0]
    grids = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns, _ in pictures.grids])
    with torch.no_grad():
        patches = torch.from_numpy(pictures.inputs["pixel_values"]).flatten(0, 1)
        made = reference.model.model.visual(patches, grid_thw=grids)
    expected = torch.cat([made.pooler_output, *made.deepstack_features], dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_positions_are_transformers(session, reference):
    pictures = session.processor([sized(240, 200), sized(64, 300)])
    ids = [1, 2, *[IMAGE] * pictures.tokens[0], 3, 4, *[IMAGE] * pictures.tokens[1], 5]
    counts, start = np.array([len(ids)]), np.array([7])
    found, after = session.processor.positions(np.array([ids]), counts, start, pictures)
    grids = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns, _ in pictures.grids])
    kinds = torch.tensor([[int(token == IMAGE) for token in ids]])
    expected, _ = Qwen3VLModel.get_rope_index(reference.model.model, torch.tensor([ids]), kinds, image_grid_thw=grids)
    np.testing.assert_array_equal(found, expected + 7)
    assert after[0] == expected.max() + 8


def test_the_layers_one_by_one_are_the_plain_forward(session, bundle, reference):
    """What the oracle adds behind the first layers is what transformers adds; without it the logits are others."""
    ids, images = prompt(session, [1, 2], sized(240, 200, 1), [3, 4, 5])
    turn = Turn("t", ids, images)
    plain, tokens = Reference(qwen3_vl.MODEL_CLASS, bundle.folder, None).record(turn, 4)
    whole = {**bundle.contract.selection, "r": 0.0}
    looped, same = Reference(qwen3_vl.MODEL_CLASS, bundle.folder, whole).record(turn, 4)
    assert tokens == same
    np.testing.assert_allclose(looped.logits, plain.logits, atol=1e-5)
    without = Reference(qwen3_vl.MODEL_CLASS, bundle.folder, whole)
    del ADDS[without._text]
    assert np.abs(without.record(turn, 0)[0].logits - plain.logits[:1]).max() > 1e-3


def test_pictures_of_other_sizes_in_three_turns(session, reference):
    turns = [
        prompt(session, [1, 2], sized(240, 200, 1), [3], sized(64, 300, 2), [4, 5, 6]),
        prompt(session, [7], sized(96, 96, 3), [8, 9]),
        prompt(session, [10, 11, 12]),
    ]
    assert_turns(session, reference, turns)


def test_rows_of_a_batch_equal_single_runs(session, reference):
    assert_rows(session, reference, sized(192, 64, 1), sized(96, 128, 2))


def test_a_chain_runs_like_the_whole(export_tiny):
    """Float32, cut before layer 2: features are added behind a selection and behind the cut's last layer."""
    folder = export_tiny("cut", family="qwen3_vl", k=1, engine="tensorrt-rtx", engine_shards=2)
    cut, recorded = open_bundle(folder), []
    assert cut.contract.chain("decoder") == ("decoder-0", "decoder-1")
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        chat = runtime.Chat(Session(cut, backend))
        steps = list(chat.generate("What is it?", [sized(112, 84)], max_new_tokens=3))
        recorded.append((steps[0].prefill.logits, [step.token_ids for step in steps]))
    np.testing.assert_equal(recorded[0], recorded[1])


@pytest.mark.parametrize("like", PARAMETERS)
def test_published_models_are_planned(like, tmp_path):
    """Sizes as the model cards of Qwen/Qwen3-VL-*-Instruct say; caches of two layers whole, of the others pruned."""
    large.write_config(tmp_path, large.config_of(like))
    prepared = pipeline.prepare(Job(str(tmp_path), "", FastV(k=2, r=0.75), max_seq_len=8192), tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(PARAMETERS[like], rel=0.005)
    contract = prepared.contract
    assert contract.feature_width == 4 * prepared.config.text_config.hidden_size
    assert [group.capacity for group in contract.groups] == [8192, 8192 - 4096 + 1024]
