"""ZipVL's forms against PyTorch: exact, bounded and static; rows of a batch that keep other counts; engines."""

import numpy as np
import pytest
from parity import assert_parity

from vlmtrim.export.families import llava
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.choosing import Choosing
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

FORMS = {
    "exact": {"tau": 0.8, "bound": 1.0},
    "bounded": {"tau": 0.9, "bound": 0.5},
    "by layer": {"tau": 0.8, "bound": (0.9, 0.5, 0.25, 0.6), "recent": 3, "spread": 0},
    "static": {"budgets": (0.5, 0.3, 0.7, 0.4)},
    "all probes": {"tau": 0.7, "bound": 1.0, "recent": 500},
}


def bundle_of(export_tiny, form, **fields):
    return export_tiny("zipvl", method="zipvl", max_batch=2, **FORMS[form], **fields)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_pytorch(form, export_tiny, capsys):
    assert_parity(bundle_of(export_tiny, form), capsys)


@pytest.mark.parametrize("form", ["exact", "bounded"])
def test_rows_of_a_batch_keep_counts_of_their_own(form, export_tiny):
    """Prompts of different lengths, padded on the right: each row as if alone, whatever the other keeps."""
    bundle = open_bundle(bundle_of(export_tiny, form))
    reference = Reference(llava.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    session = Session(bundle, make_backend("ort-cpu"), batch=2)
    random, image = np.random.default_rng(0), [bundle.contract.image_token_id] * bundle.contract.image_tokens
    text = random.integers(0, 250, 60).tolist()
    rows = [[256, *text[:3], *image, *text[3:9]], [256, *text[9:20], *image, *text[20:60]]]
    images = (generated_picture(0), generated_picture(1))
    prefill = session.prefill(rows, session.processor(images))
    caches = [session.cache_contents(row) for row in range(2)]
    expected = [reference.record(Turn("row", rows[row], images[row : row + 1]), 8) for row in range(2)]
    logits = [prefill.logits]
    for step in range(8):
        logits.append(session.decode(np.array([fed[step] for _, fed in expected])))
    groups = [group.layers for group in bundle.contract.groups]
    assert prefill.kept_by_layer is not None
    for row, (want, _) in enumerate(expected):
        kept = [by_row[row] for by_row in prefill.kept_by_layer]
        found = Recording(None, caches[row], np.stack([step[row] for step in logits]), kept_by_layer=kept)
        assert all(np.array_equal(a, b) for a, b in zip(kept, want.kept_by_layer, strict=True))
        assert Parity(tuple(compare("row", found, want, groups, "float32")))
    counts = [prefill.layers_that_keep(row).sum(axis=1).tolist() for row in range(2)]
    assert form != "exact" or counts[0] != counts[1]


# float16: tests/export/test_families.py
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_engines_build_with_both_profiles(dtype, export_tiny):
    folder = bundle_of(export_tiny, "bounded", dtype=dtype, engine="tensorrt-rtx", images=2)
    assert (folder / "decoder.engine").stat().st_size > 100_000


def test_a_chain_of_engines_builds(export_tiny):
    folder = bundle_of(export_tiny, "bounded", dtype="float16", engine="tensorrt-rtx", engine_shards=2)
    assert (folder / "decoder-1.engine").stat().st_size > 100_000


def test_a_count_beyond_the_contract_is_refused(export_tiny):
    bundle = open_bundle(bundle_of(export_tiny, "bounded"))
    outputs = {f"kept_counts.{index}": np.array([9, 3]) for index in range(4)}
    backend = make_backend("ort-cpu")
    backend.to_host = lambda tensor: tensor
    with pytest.raises(
        RuntimeRefusal, match=r"layer 0 kept \[9, 3\] of 16 visual tokens, its contract promises at most 8"
    ):
        Choosing(bundle.contract, backend).added(outputs, np.array([20, 20]), 16)
