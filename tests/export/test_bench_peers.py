"""The comparison with other runtimes: what drivers are asked, what they say, and what the table makes of it."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import bench_peers
import numpy as np
import pytest
import wire
from peers import prepare
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

FAKE = """
import sys
sys.path.insert(0, {peers!r})
import wire

def load(request):
    if request.get("broken"):
        raise ValueError("no such thing\\nmore of it")
    print("noise of a library")
    return lambda asked: {{"ttft": 4.0 if asked.get("pruned") else 8.0, "rate": 10.0, "vision": 2.0, "rss": 3 << 30}}

wire.serve(load)
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    (tmp_path / "fake.py").write_text(FAKE.format(peers=str(SCRIPTS / "peers")))
    args = argparse.Namespace(new_tokens=4, memory=18.0, json=tmp_path / "samples.json")
    prunings = {"-": {}, "50 %": {"pruned": 50}}
    subjects = [
        prepare.Subject("ours", "float32", "fake.py", {"packages": ["numpy"]}),
        prepare.Subject("other", "int8", "fake.py", {"packages": []}, prunings=prunings),
        prepare.Subject("broken", "int4", "fake.py", {"packages": [], "broken": True}),
    ]
    made = bench_peers.Bench(args, tmp_path, subjects)
    yield made
    for index in list(made.alive):
        made._end(index)


def test_rounds_fill_the_table_and_say_why_a_peer_is_missing(bench):
    bench.round(1)
    bench.round(2)
    table = bench.table().splitlines()
    assert "| ours | float32 | - | 8.0 | 2.0 | 6.0 | 10.0 | 3,221 | 1.00 | 1.00 | 2 |" in table
    assert "| other | int8 | 50 % | 4.0 | 2.0 | 2.0 | 10.0 | 3,221 | 0.50 | 1.00 | 2 |" in table
    assert table[-1].startswith("| broken int4 | skipped: ValueError: no such thing |")
    assert len({line.count("|") for line in table}) == 1
    rows = json.loads(bench.args.json.read_text())["rows"]
    assert [(row["peer"], row["pruned"], len(row["samples"])) for row in sorted(rows, key=str)] == [
        ("other", "-", 2),
        ("other", "50 %", 2),
        ("ours", "-", 2),
    ]
    assert bench.versions["numpy"] == np.__version__


@pytest.mark.parametrize(("memory", "kept"), [(18.0, 2), (8.0, 1), (4.0, 0)])
def test_peers_stay_loaded_while_the_largest_fits_beside_them(bench, memory, kept):
    bench.args.memory = memory
    bench.round(1)
    assert len(bench.alive) == kept


def test_a_peer_that_dies_is_skipped(bench, tmp_path):
    (tmp_path / "fake.py").write_text("raise SystemExit(3)")
    bench.round(1)
    assert bench.skipped["ours float32"] == "its process ended with 3"
    assert not bench.samples


def test_the_picture_as_a_file_is_the_picture():
    size, data = wire.picture({"turn": 5})
    with Image.open(io.BytesIO(wire.png({"turn": 5}))) as picture:
        assert picture.size == size == wire.FULL
        assert picture.tobytes() == data
    assert data != wire.picture({"turn": 6})[1]


def test_every_turn_asks_as_much_and_something_else():
    texts = [wire.prompt(turn, "*") for turn in (0, 7, 999)]
    assert len(set(texts)) == 3
    assert len(set(map(len, texts))) == 1


def test_rates_count_the_steps_behind_the_first_token():
    assert wire.rates(1.0, [3.0, 3.5, 4.0]) == {"ttft": 2.0, "rate": 2.0, "new": 3}


def test_memory_is_that_of_the_processes_named():
    alone = wire.memory()
    assert 0 < alone["rss"] <= alone["peak"]
    assert json.dumps(alone)
