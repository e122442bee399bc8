"""Every rule against PyTorch, where it applies, and its engines."""

import json

import pytest
from parity import room_of

from vlmtrim import runtime
from vlmtrim.export import check_cli, pipeline
from vlmtrim.export.demo.evaluate import CHECKPOINT
from vlmtrim.export.job import Job, Refusal
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.rules import ATTENTION, GRID, PLACES, VISION, load_rule, rule_names
from vlmtrim.runtime.select_backend import make_backend

# What test_parity.py and test_families.py do not hold: rules of embeddings and of places.
RULES = [rule for rule in rule_names() if rule not in ("coverage", "last-row", "no-rope", "random", "stride")]
GREEDY = ("cdpruner", "divprune", "dpp")
FAMILIES = {"llava": {GRID, PLACES, VISION}, "qwen2_vl": {PLACES}, "qwen2_5_vl": {PLACES}, "llava_next": set()}
PAIRS = [(f, rule) for f, tells in FAMILIES.items() for rule in RULES if load_rule(rule).NEEDS - {ATTENTION} <= tells]


@pytest.mark.parametrize(("family", "rule"), [pair for pair in PAIRS if pair[1] != "topv-recover"])
def test_what_is_kept_equals_pytorch(family, rule, export_tiny, capsys):
    """Three turns in float32: kept sets equal, but where two scores tie; caches, logits and tokens within 1e-4."""
    k = 0 if ATTENTION not in load_rule(rule).NEEDS and family != "llava" else 2
    folder = export_tiny("rule", family=family, k=k, r=0.5 if k else 0.75, score=rule, **room_of(family))
    assert check_cli.main([str(folder), "--json", "--tokens", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert max(row["difference"] for row in rows if row["what"] == "kept tokens") < 1e-6
    assert any(row["what"] == "decode logits, 4 steps" for row in rows)


def test_a_tower_without_class_token_ranks_by_all_its_patches(export_tiny, capsys):
    variant = {"vision": "siglip_vision_model", "text": "qwen2"}
    folder = export_tiny("rule", variant, k=0, r=0.5, score="fastervlm", max_batch=2)
    assert check_cli.main([str(folder), "--json", "--tokens", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert max(row["difference"] for row in rows if row["what"] == "kept tokens") < 1e-6


def test_recovery_equals_pytorch_on_a_trained_model(tmp_path, capsys):
    """In random models scores are so alike that ties decide what comes back."""
    method = FastV(k=2, r=0.5, score="topv-recover")
    job = Job("demo", str(tmp_path / "bundle"), method, dtype="float32", max_seq_len=512)
    folder = pipeline.export(job, CHECKPOINT)
    capsys.readouterr()
    assert check_cli.main([str(folder), "--json", "--tokens", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert max(row["difference"] for row in rows if row["what"] == "kept tokens") < 1e-6


# One of attention, of places, of picks one by one and of a loop; the rest is slow.
QUICK = ("own-row", "cells", "divprune", "topv")
ENGINES = [pytest.param(rule, marks=[pytest.mark.slow] * (rule not in QUICK)) for rule in RULES]


@pytest.mark.parametrize("rule", ENGINES)
def test_engines_build(rule, export_tiny):
    """TensorRT-RTX in float16, both profiles; picks one by one in an engine of their own."""
    folder = export_tiny(
        "rule", k=2, r=0.5, score=rule, max_batch=2, dtype="float16", engine="tensorrt-rtx", engine_shards=1
    )
    decoders = [path.name for path in folder.glob("decoder*.engine")]
    assert len(decoders) == (2 if rule in GREEDY else 1)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_selection_apart_runs_like_the_whole(shards, export_tiny, picture):
    """On ONNX Runtime, in float32, to the bit."""
    folder = export_tiny("apart", k=2, r=0.5, score="divprune", engine="tensorrt-rtx", engine_shards=shards)
    bundle, recorded = open_bundle(folder), []
    assert len(bundle.contract.chain("decoder")) == 1 + shards
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        chat = runtime.Chat(runtime.Session(bundle, backend))
        steps = list(chat.generate("What is it?", [picture], max_new_tokens=3))
        steps += list(chat.generate("And this?", [picture], max_new_tokens=2))
        steps += list(chat.generate("Why?", max_new_tokens=2))
        prefills = [step.prefill for step in steps if step.index == 0]
        recorded.append(
            [
                [step.token_ids for step in steps],
                [prefill.logits.tolist() for prefill in prefills],
                [[row.tolist() for row in prefill.kept_indices] for prefill in prefills],
                [key.tolist() for pair in chat.session.cache_contents(0) for key in pair],
            ]
        )
    assert recorded[0] == recorded[1]


@pytest.mark.parametrize(
    ("family", "rule"), [("llava_next", "cells"), ("llava_next", "fastervlm"), ("qwen2_vl", "topv")]
)
def test_pictures_of_any_shape_are_refused_where_places_matter(family, rule, export_tiny):
    with pytest.raises(Refusal, match=f"--score {rule} (needs to know where|ranks visual).* give one of .*divprune"):
        export_tiny("refused", family=family, k=2, r=0.5, score=rule)
