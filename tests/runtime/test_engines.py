"""Real TensorRT-RTX engines, built without a GPU, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import toy_decoder

from vlmtrim import runtime
from vlmtrim.graphs import FastV, save
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.checksums import sha256
from vlmtrim.graphs.contract import CacheGroup, Contract, kept_count
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.engines import fingerprint, profiles
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.select_backend import make_backend


@pytest.fixture(scope="module")
def half_bundle(export_tiny):
    return export_tiny("engine", k=2, r=0.5, dtype="float16", engine="tensorrt-rtx", max_batch=2)


def test_engines_hold_two_profiles_and_a_fingerprint(half_bundle):
    bundle = open_bundle(half_bundle)
    prints = json.loads(bundle.file(fingerprint.FILE).read_text())
    assert set(prints) == {"vision.engine", "embed.engine", "decoder.engine"}
    for name, entry in prints.items():
        assert bundle.file(name).stat().st_size == entry["bytes"] > 100_000
        assert entry["onnx_sha256"] == sha256(bundle.file(name.replace(".engine", ".onnx")))
        assert entry["library"] == "tensorrt-rtx" and entry["version"].startswith("1.")
    assert set(prints["decoder.engine"]["profiles"]) == {"prefill", "decode"}


def test_the_second_profile_does_not_double_the_weights(half_bundle):
    """DESIGN: a profile with only fixed dims would; ours admits two tokens."""
    bundle = open_bundle(half_bundle)
    decoder_weights = bundle.file("model.safetensors").stat().st_size
    engine = bundle.file("decoder.engine").stat().st_size
    assert engine < decoder_weights + 16e6  # kernels and plans of a tiny model are larger than its 5 MB of weights


@pytest.fixture(scope="module")
def cut_bundle(export_tiny):
    return export_tiny("cut", k=1, r=0.5, engine="tensorrt-rtx", engine_shards=3, max_batch=2)


def test_a_decoder_is_built_in_pieces(cut_bundle):
    """An engine for every piece, and what a device needs to chain them; the pieces hold every weight once."""
    bundle = open_bundle(cut_bundle)
    assert bundle.contract.chain("decoder") == ("decoder-0", "decoder-1", "decoder-2")
    assert bundle.contract.chain("vision") == ("vision",)
    prints = json.loads(bundle.file(fingerprint.FILE).read_text())
    assert set(prints) == {"vision.engine", "embed.engine", *(f"decoder-{i}.engine" for i in range(3))}
    for name, entry in prints.items():
        assert entry["onnx_sha256"] == sha256(bundle.file(name.replace(".engine", ".onnx")))
    assert prints["decoder-2.engine"]["profiles"]["decode"]["Sk"] == [1, 1, 2]


def test_a_chain_runs_like_the_whole(cut_bundle, picture):
    """On ONNX Runtime, which needs no pieces, in float32: same logits, caches and kept tokens, to the bit."""
    bundle, images = open_bundle(cut_bundle), [[picture], [picture]]
    recorded = []
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        chat = runtime.Chat(runtime.Session(bundle, backend, batch=2))
        steps = list(chat.generate(["What is it?", "And what is this one?"], images, max_new_tokens=4))
        steps += list(chat.generate(["Why?", "Is it?"], max_new_tokens=2))
        caches = [array for row in range(2) for pair in chat.session.cache_contents(row) for array in pair]
        recorded.append((steps, caches))
    (whole, whole_caches), (pieces, caches) = recorded
    assert [step.token_ids for step in whole] == [step.token_ids for step in pieces]
    np.testing.assert_array_equal(whole[0].prefill.logits, pieces[0].prefill.logits)
    kept, kept_in_pieces = whole[0].prefill.kept_indices, pieces[0].prefill.kept_indices
    for expected, found in zip([*kept, *whole_caches], [*kept_in_pieces, *caches], strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("k", "r", "score", "dtype"),
    [
        (0, 0.5, "last-row", "float16"),
        (1, 0.25, "last-row", "float16"),
        (2, 0.5, "no-rope", "float16"),
        (2, 0.75, "no-rope", "bfloat16"),
        (2, 0.5, "coverage", "bfloat16"),
        (2, 0.25, "random", "float16"),
    ],
)
def test_every_form_of_the_selection_builds(export_tiny, k, r, score, dtype):
    """k = 0 (stride), every score, the loser side (r < 0.5) and the winner side of the TopK."""
    folder = export_tiny(f"form-{k}-{r}-{score}", k=k, r=r, score=score, dtype=dtype, max_batch=2)
    bundle = open_bundle(folder)
    trt = engines.import_library("tensorrt-rtx")
    spec = bundle.contract.graphs["decoder"]
    engine, _ = engines._build(
        trt, "tensorrt-rtx", folder / spec.file, spec, profiles.decoder_profiles(bundle.contract)
    )
    assert len(engine) > 100_000


@pytest.mark.parametrize("r", [0.3, 0.5])
def test_more_visual_winners_than_one_topk_takes_build(tmp_path, r):
    """13,000 visual tokens, of which a TopK would take 3900 or 6500: both profiles, two rows."""
    most, capacity, size = 13_000, 13_100, 64
    decoder = FastV(k=1, r=r)(toy_decoder.build(toy_decoder.weights(0, 2, 2, 1, size), capacity), visual_tokens=most)
    assert sum(node.op_type == "TopK" for node in decoder.graph) == 2
    save(decoder, tmp_path / "decoder.onnx")
    later = capacity - most + kept_count(most, r)
    groups = (CacheGroup((0,), capacity, 1, size), CacheGroup((1,), later, 1, size, r))
    spec = decoder_spec(dtype="float32", hidden=2 * size, vocabulary=13, groups=groups, selects=True)
    dims = {"B": (1, 2), "S": (1, capacity), "N": (0, most), "W0": (1, capacity), "W1": (1, later)}
    contract = Contract("toy", "float32", {"decoder": spec}, groups, dims, {}, capacity, 1, most, 0, (1,))
    trt, ranges = engines.import_library("tensorrt-rtx"), profiles.decoder_profiles(contract)
    engine, _ = engines._build(trt, "tensorrt-rtx", tmp_path / "decoder.onnx", spec, ranges)
    assert len(engine) > 100_000 and ranges["prefill"]["N"].max == most


def test_every_graph_of_a_bfloat16_chain_builds(export_tiny):
    """Vision, embedding and both pieces of the decoder, a winner-side TopK directly before the last layer, which takes
    its row of what was just gathered."""
    fields = {"k": 3, "r": 0.9, "dtype": "bfloat16", "engine": "tensorrt-rtx", "engine_shards": 2}
    bundle = open_bundle(export_tiny("chain-bfloat16", **fields))
    prints = fingerprint.read(bundle.folder)
    assert set(prints) == {f"{name}.engine" for name in ("vision", "embed", "decoder-0", "decoder-1")}
    for name in ("embed.engine", "decoder-0.engine", "decoder-1.engine"):
        assert list(prints[name].profiles) == ["prefill", "decode"]


def test_profiles_come_from_the_contract(fastv_bundle):
    contract: Contract = open_bundle(fastv_bundle).contract
    both = profiles.decoder_profiles(contract)
    assert both["decode"]["S"] == profiles.Range(1, 1, 2) and both["decode"]["N"] == profiles.Range(0, 0, 0)
    assert both["prefill"]["S"].max == contract.max_seq_len
    for index, group in enumerate(contract.groups):
        assert both["prefill"][f"W{index}"].max == both["decode"][f"W{index}"].max == group.capacity
    assert both["prefill"]["B"].max == 2
    assert profiles.admits(both["decode"], {"S": 1, "N": 0}) and not profiles.admits(both["decode"], {"S": 3})
    larger = profiles.decoder_profiles(dataclasses.replace(contract, images_assumed=40))
    assert larger["prefill"]["N"].opt == contract.dims["N"][1]


def test_a_profile_out_of_order_is_refused():
    with pytest.raises(ValueError, match="min <= opt <= max"):
        profiles.Range(2, 1, 3)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeRefusal, match=r"vlmtrim\[tensorrt\]"):
        engines.import_library("tensorrt")


def test_a_missing_library_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    from vlmtrim.export import cli

    real = engines.importlib.util.find_spec
    hidden = ("tensorrt", "tensorrt_bindings")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    argv = ["--model", "tiny:llava", "--engine", "tensorrt", "--output", str(tmp_path / "b")]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert "vlmtrim[tensorrt]" in error and "trace" not in error and not (tmp_path / "b").exists()


def test_an_unparsable_graph_is_refused_with_the_reason(half_bundle, tmp_path):
    bundle = open_bundle(half_bundle)
    trt = engines.import_library("tensorrt-rtx")
    (tmp_path / "decoder.onnx").write_bytes(b"no onnx")
    with pytest.raises(RuntimeRefusal, match=r"cannot parse decoder\.onnx"):
        engines._build(trt, "tensorrt-rtx", tmp_path / "decoder.onnx", bundle.contract.graphs["decoder"], {})
