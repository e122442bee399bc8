"""batch-vlm with two engines on the CPU: answers, errors in their rows, a worker and a whole job that are killed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.resources import files

import processes
import pytest
import serving
from PIL import Image as Pillow

import vlmtrim.runtime as vlm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
TWO = ["--backend", "ort-cpu", "--replicas", "2"]
BATCH = [sys.executable, "-m", "vlmtrim.runtime.batch.cli"]


def batch(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([*BATCH, *map(str, arguments)], capture_output=True, text=True)


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def asked(demo, tmp_path_factory):
    """A Parquet file of 200 rows, some of them bad, and what each good one gets from a session of its own."""
    import pyarrow
    import pyarrow.parquet

    folder = files("vlmtrim.export.demo") / "examples"
    examples = [(folder / e["file"], e["question"]) for e in json.loads((folder / "examples.json").read_text())]
    with vlm.open(demo) as chat:
        expected = []
        for path, question in examples:
            chat.reset()
            expected.append("".join(step.text for step in chat.generate(question, [str(path)], max_new_tokens=16)))
    file = io.BytesIO()
    Pillow.new("RGB", (3, 3), "red").save(file, "PNG")
    bad = [(file.getvalue()[:40], "Cut?"), (b"%!PS-Adobe", "What?"), (None, ""), (file.getvalue(), "a " * 5000)]
    rows, answers = [], {}
    for n in range(200):
        name = f"row {n}"
        if n % 20 == 7:
            image, prompt = bad[n // 20 % 4]
        else:
            (path, prompt), answers[name] = examples[n % len(examples)], expected[n % len(examples)]
            image = path.read_bytes()
        rows.append({"id": name, "image": image, "prompt": prompt})
    path = tmp_path_factory.mktemp("asked") / "asked.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    return path, answers


def check(found: list[dict], answers: dict[str, str]) -> None:
    """Every row once, its own answer, and an error where it is bad."""
    assert Counter(record["id"] for record in found) == Counter(f"row {n}" for n in range(200))
    assert {record["id"]: record["answer"] for record in found if record["error"] is None} == answers
    for record in found:
        if record["error"] is None:
            assert (record["visual_tokens"], record["kept"], record["removed"]) == (144, 72, 72)
            assert record["ended"] == "eos" and record["prefill_s"] > 0
        else:
            assert record["answer"] is None and record["kept"] is None


def begin(*arguments) -> subprocess.Popen:
    return subprocess.Popen([*BATCH, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_job_that_is_killed_goes_on_and_a_worker_that_dies_is_replaced(demo, asked, tmp_path):
    """Every row exactly once, on the way through two kills."""
    (source, answers), output = asked, tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.jsonl"
    arguments = [demo, source, "--output", output, "--max-new-tokens", 16, *TWO]
    first = begin(*arguments)
    while lines(journal) < 20 and first.poll() is None:
        time.sleep(0.005)
    first.kill()
    first.wait()
    kept = journal.read_bytes()
    assert 20 <= lines(journal) < 200 and not output.exists()
    second = begin(*arguments)
    serving.eventually(lambda: lines(journal) > kept.count(b"\n") or second.poll() is not None, 90)
    workers = processes.below(second.pid, b"ray::MapWorker")
    os.kill(workers[0], signal.SIGKILL)
    said = second.communicate()[1]
    assert second.returncode == 1 and " 0 missing" in said and "Traceback" not in said, said
    found = records(journal)
    check(found, answers)
    assert journal.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(output).to_pylist() == found


def test_what_cannot_be_done_is_said_in_a_sentence(demo, tmp_path, capsys):
    from vlmtrim.runtime.batch import cli

    output = ["--output", str(tmp_path / "out.jsonl")]
    folder = str(files("vlmtrim.export.demo") / "examples")
    for arguments, said in [
        ([str(demo), folder, *output], "give --prompt TEXT"),
        ([str(tmp_path), folder, "--prompt", "a", *output], "is no bundle"),
        ([str(demo), str(tmp_path), "--prompt", "a", *output], "holds no pictures"),
        ([str(demo), folder, "--prompt", "a", "--output", str(tmp_path / "out.txt")], "ends in .jsonl or .parquet"),
        ([str(demo), folder, "--prompt", "a", "--replicas", "0", *output], "--replicas is 0"),
        ([str(demo), folder, "--prompt", "a", "--max-new-tokens", "0", *output], "--max-new-tokens is 0"),
        ([str(demo), folder, "--prompt", "a", "--address", "127.0.0.1:1", *output], "there is no Ray cluster"),
    ]:
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("batch-vlm: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_folder_and_an_engine_that_is_refused(demo, tmp_path):
    folder = files("vlmtrim.export.demo") / "examples"
    arguments = [demo, folder, "--prompt", "Which word is written?", "--max-new-tokens", 16, "--backend", "ort-cpu"]
    done = batch(*arguments, "--output", tmp_path / "out.jsonl", "--slots", 3)
    assert done.returncode == 2 and done.stderr.endswith(
        "batch 3 is outside the bundle's 1 to 2; export with --max-batch\n"
    )
    done = batch(*arguments, "--output", tmp_path / "out.jsonl")
    assert done.returncode == 0 and done.stdout == "" and " 0 errors" in done.stderr
    assert {record["id"]: record["answer"] for record in records(tmp_path / "out.jsonl")}["word.png"] == "sun"
    again = batch(*arguments, "--output", tmp_path / "out.jsonl")
    assert again.returncode == 0 and "0 rows answered" in again.stderr


@pytest.mark.slow
def test_a_row_that_kills_its_process_is_an_error_and_others_are_answered(demo, tmp_path):
    """A worker that dies whenever it meets one picture: tries are counted, then its rows are errors."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    word = (files("vlmtrim.export.demo") / "examples" / "word.png").read_bytes()
    for n in range(12):
        (folder / f"{n:02}.png").write_bytes(word)
    program = tmp_path / "deadly.py"
    program.write_text(DEADLY)
    arguments = [demo, folder, "--prompt", "Which word is written?", "--output", tmp_path / "out.jsonl"]
    command = [sys.executable, program, *map(str, [*arguments, "--backend", "ort-cpu"])]
    done = subprocess.run(command, capture_output=True, text=True)
    found = {record["id"]: record for record in records(tmp_path / "out.jsonl")}
    assert done.returncode == 1 and " 0 missing" in done.stderr and len(found) == 12
    assert "the process died 3 times" in found["05.png"]["error"]
    answered = [record["answer"] for record in found.values() if record["error"] is None]
    assert set(answered) == {"sun"} and len(answered) >= 4


DEADLY = """
import os, sys
from vlmtrim.runtime.batch import cli, worker

class Deadly(worker.Worker):
    def _asked(self, engine, row):
        if row.id == "05.png":
            os.kill(os.getpid(), 9)
        return super()._asked(engine, row)

worker.Worker = Deadly
sys.exit(cli.main(sys.argv[1:]))
"""
