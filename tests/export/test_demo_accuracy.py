"""The shipped model under pruning, held to the report of scripts/accuracy.py (accuracy.json is a copy of it)."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from vlmtrim.export import check_cli, pipeline
from vlmtrim.export.demo import task
from vlmtrim.export.demo.evaluate import CHECKPOINT, Demo
from vlmtrim.export.demo.measure import Z, ask
from vlmtrim.export.job import Job
from vlmtrim.export.weights import read_header
from vlmtrim.graphs import FastV
from vlmtrim.graphs.checksums import sha256

REPORT = json.loads((Path(__file__).parent / "accuracy.json").read_text())
SETTINGS = {
    "dense": None,
    "k2-r0.5": FastV(k=2, r=0.5),
    "k2-r0.75": FastV(k=2, r=0.75),
    "k4-r0.5": FastV(k=4, r=0.5),
    "k4-r0.75": FastV(k=4, r=0.75),
}
FIXED = 36  # questions that are asked one by one: three of every kind


def reported(name):
    method = SETTINGS[name]
    wanted = {"method": "none"} if method is None else method.describe()
    return next(run for run in REPORT["runs"] if all(run.get(field) == value for field, value in wanted.items()))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """bundle(a name of SETTINGS, or "int4") -> folder; each is exported by the first test that asks."""
    folder, traces = tmp_path_factory.mktemp("demo"), {}
    common = {"model": "demo", "dtype": "float32", "max_seq_len": 256, "max_batch": 16}

    @functools.cache
    def give(name):
        job = Job(output=str(folder / name), weights="int4", **common)
        if name in SETTINGS:
            job = Job(output=str(folder / name), method=SETTINGS[name], **common)
        return pipeline.export(job, CHECKPOINT, traces)

    return give


@pytest.fixture(scope="module")
def examples():
    return list(task.examples("test", len(reported("dense")["first"])))


@pytest.fixture(scope="module")
def answers(bundle, examples):
    """answers(name) -> what a bundle says to all examples, asked once."""
    return functools.cache(lambda name: ask(bundle(name), examples))


def test_the_report_is_of_the_shipped_weights():
    assert REPORT["weights"] == sha256(CHECKPOINT / "model.safetensors")
    assert REPORT["questions"] >= 1000
    assert reported("dense")["all"]["share"] >= 0.9


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("k4")) for n in SETTINGS])
def test_accuracy_is_the_reports(answers, name):
    """The same questions are answered as then, and their share lies where the report's larger sample puts it."""
    run = reported(name)
    right = answers(name).right
    then = [mark == "1" for mark in run["first"]]
    assert sum(a != b for a, b in zip(right, then, strict=True)) <= 2  # a near tie may fall otherwise elsewhere
    share, count = run["all"]["share"], len(right)
    assert abs(right.mean() - share) <= Z * (share * (1 - share) / count) ** 0.5 + (run["all"]["high"] - share)


@pytest.mark.parametrize("name", ["pytorch", "dense", "k2-r0.5"])
def test_a_fixed_list_of_held_out_questions_is_answered(bundle, examples, name):
    """Questions that the report has as right, dense and pruned; unseen in training."""
    both = [
        example
        for example, *marks in zip(examples, reported("dense")["first"], reported("k2-r0.5")["first"], strict=True)
        if marks == ["1", "1"]
    ][:FIXED]
    assert len({example.question.kind for example in both}) == len(task.QUESTION_KINDS)
    expected = [example.question.answer for example in both]
    said = Demo().answers(both) if name == "pytorch" else ask(bundle(name), both).texts
    assert said == expected


def test_four_bits_answer_alike(answers, examples):
    """k = 2 and r = 0.5, in int4 and in float32: as many questions are right (intervals: BENCHMARKS)."""
    packed, plain = answers("int4"), answers("k2-r0.5")
    same = sum(one == other for one, other in zip(packed.texts, plain.texts, strict=True))
    assert same >= 0.97 * len(examples)
    assert abs(packed.right.mean() - plain.right.mean()) <= 0.02


def test_a_head_that_shares_the_embedding_is_packed_beside_it(bundle, capsys):
    """The demo ties the two: the embedding stays as the checkpoint has it, the head is read from its own bytes."""
    names = read_header(bundle("int4") / "model.safetensors")
    assert "lm_head.weight.int8" in names and "lm_head.weight" not in names
    embedding = next(tensor for name, tensor in names.items() if "embed_tokens" in name)
    assert embedding.code == "F16"  # only the rows that are read are widened
    norms = [tensor.code for name, tensor in names.items() if name.endswith("layernorm.weight")]
    assert norms and set(norms) == {"F32"}
    assert check_cli.main([str(bundle("int4")), "--tokens", "8"]) == 0, capsys.readouterr().out
