"""--calibrate: bounds are the mean and one deviation of what every layer keeps on the pictures of a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from vlmtrim import runtime
from vlmtrim.export import calibration, cli, pipeline
from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.job import Job, Refusal
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.image import generated_picture

ZipVL = load_method("zipvl")


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for number in range(4):
        generated_picture(number).save(made / f"{number}.png")
    (made / "1.txt").write_text("Which word is written?\n")
    (made / "notes.md").write_text("no picture")
    return made


def test_pictures_and_their_questions_come_by_name(folder):
    asked = calibration.questions(folder)
    assert [picture.name for picture, _ in asked] == ["0.png", "1.png", "2.png", "3.png"]
    assert [question for _, question in asked][:2] == [calibration.QUESTION, "Which word is written?"]


def test_bounds_are_what_the_exact_form_keeps(folder, export_tiny, tmp_path):
    """The oracle asks the exact form's bundle by itself."""
    exact = export_tiny("zipvl", method="zipvl", tau=0.8, bound=1.0)
    job = Job("tiny:llava", str(tmp_path / "out"), ZipVL(tau=0.8), calibrate=str(folder))
    asked_for = []
    found, text = calibration.calibrate(job, lambda other: asked_for.append(other) or exact, tmp_path)
    assert asked_for[0].method == ZipVL(tau=0.8, bound=1.0) and asked_for[0].engine == "none"
    shares = []
    for picture, question in calibration.questions(folder):
        with runtime.open(exact) as chat:
            prefill = next(iter(chat.generate(question, [picture], max_new_tokens=1))).prefill
            visual = set(prefill.visual_positions[0].tolist())
            shares.append([len(visual & set(rows[0].tolist())) / len(visual) for rows in prefill.kept_by_layer])
    means, deviations = np.mean(shares, axis=0), np.std(shares, axis=0)
    assert found.method.bound == pytest.approx(np.minimum(1, means + deviations))
    assert [layer["mean"] for layer in json.loads(text)["layers"]] == pytest.approx(means)
    assert dataclasses.replace(found, method=job.method) == job


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            FastV(),
            "measures bounds of --method zipvl or shares .*; the method is fastv, the weights are float",
        ),
        (None, "the method is none"),
        (ZipVL(budgets=(0.5,)), "leave one of them out"),
        (ZipVL(bound=(0.5, 0.5)), "leave one of them out"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_work(method, says, folder):
    with pytest.raises(Refusal, match=says):
        calibration.check(Job("demo", "out", method, calibrate=str(folder)))


def test_a_folder_without_pictures_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("no picture")
    for folder, says in ((tmp_path, "holds no pictures"), (tmp_path / "nowhere", "cannot be read")):
        assert cli.main(["--model", "demo", "--method", "zipvl", "--calibrate", str(folder)]) == 2
        assert says in capsys.readouterr().err


def test_the_demo_ships_budgets_that_both_flags_read():
    """Measured on 64 training pictures at tau 0.9."""
    shipped = DEMO / calibration.FILE
    args = cli.parse(["--model", "demo", "--method", "zipvl", "--budgets", str(shipped)])
    layers = json.loads(shipped.read_text())["layers"]
    assert len(layers) == 8
    assert args.budgets == tuple(layer["mean"] for layer in layers)
    bound = cli.parse(["--model", "demo", "--method", "zipvl", "--bound", str(shipped)]).bound
    assert bound == tuple(min(1.0, layer["mean"] + layer["deviation"]) for layer in layers)


def test_budgets_lie_in_the_bundle_under_a_checksum(export_tiny, tmp_path):
    dense = open_bundle(export_tiny("dense", method="none")).folder
    job = Job(str(dense), str(tmp_path / "b"), None, max_seq_len=512)
    made = pipeline.export(job, dense, files={calibration.FILE: "{}\n"})
    assert open_bundle(made).files.text(calibration.FILE) == "{}\n"
