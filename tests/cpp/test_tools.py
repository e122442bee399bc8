"""vlmtrim-run prints what run-vlm prints; vlmtrim-bench and the examples run."""

import json
import subprocess
from pathlib import Path

import pytest
from probing import build_folder

from vlmtrim.runtime import cli

EXAMPLES = Path(__file__).resolve().parents[2] / "export/demo/examples"


def run(tool, *arguments, stdin=""):
    command = [build_folder() / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=120)


ASKED = ["--image", EXAMPLES / "word.png", "--prompt", "Which word is written?"]


@pytest.mark.parametrize(
    "more", [[], ["--system", "Be brief."], ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "11"]]
)
def test_the_record_is_run_vlms(more, demo_bundle, capsys):
    assert cli.main([str(demo_bundle), *map(str, ASKED), *more, "--json", "--backend", "ort-cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    done = run("vlmtrim-run", demo_bundle, *ASKED, *more, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(expected) and list(found["times"]) == list(expected["times"])
    times = found.pop("times"), expected.pop("times")
    assert found == expected and all(value >= 0 for value in times[0].values()) and times[0]["prefill"] > 0


def test_an_answer_is_streamed(demo_bundle):
    whole = json.loads(run("vlmtrim-run", demo_bundle, *ASKED, "--json").stdout)
    done = run("vlmtrim-run", demo_bundle, *ASKED[:2], "--prompt=-", stdin="Which word is written?")
    assert done.stdout == whole["text"] + "\n"
    assert f"{whole['visual']} visual tokens, {whole['kept']} kept" in done.stderr and "tokens/s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "x", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "x", "--nonsense"], "unknown option --nonsense"),
        (["--prompt"], "--prompt is without a value"),
        ([], "give --prompt TEXT"),
        (["--prompt", "x", "--image", "/nowhere.png"], "no picture at /nowhere.png"),
        (["--ids", "1 two"], "--ids holds something else"),
        (["--ids", "1 99999"], "the prompt holds token 99999"),
    ],
)
def test_bad_input_is_a_sentence(arguments, said, demo_bundle):
    done = run("vlmtrim-run", demo_bundle, *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_no_bundle_is_a_sentence(tmp_path):
    done = run("vlmtrim-run", tmp_path, "--prompt", "x")
    assert done.returncode == 2 and "is no bundle" in done.stderr


def test_help_and_version():
    assert run("vlmtrim-run", "--version").stdout == "vlmtrim 0.1.0\n"
    assert "usage: vlmtrim-run" in run("vlmtrim-run", "--help").stdout
    assert "usage: vlmtrim-bench" in run("vlmtrim-bench", "--help").stdout


def test_bundles_are_timed_in_turns(demo_bundle, fastv_bundle):
    done = run("vlmtrim-bench", demo_bundle, fastv_bundle, *ASKED, "--rounds", "2", "--max-new-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["bundle"] for row in found["rows"]] == [str(demo_bundle), str(fastv_bundle)]
    assert {row["backend"] for row in found["rows"]} == {"ort-cpu"}
    assert all(row["kept"] < row["visual"] and row["prefill_ms"] > 0 for row in found["rows"])
    assert found["resident_peak"] >= found["resident"] > 0
    table = run("vlmtrim-bench", demo_bundle, *ASKED, "--rounds", "1", "--backend", "ort-cpu").stdout
    assert len(table.splitlines()) == 3 and "a token" in table


def test_a_backend_that_is_not_there_is_not_timed(demo_bundle):
    done = run("vlmtrim-bench", demo_bundle, *ASKED, "--backend", "tensorrt")
    assert done.returncode == 2 and "is not in this library; supported: auto, ort-cuda, ort-cpu" in done.stderr


def test_the_examples_answer(demo_bundle, tmp_path):
    chat = run("vlmtrim-example-chat", demo_bundle, EXAMPLES / "word.png", stdin="Which word is written?\nSure?\n")
    answer = json.loads(run("vlmtrim-run", demo_bundle, *ASKED, "--json").stdout)["text"]
    assert chat.returncode == 0 and chat.stdout.startswith(f"> {answer}\n> ")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes((EXAMPLES / "word.png").read_bytes())
    frames = run("vlmtrim-example-frames", demo_bundle, tmp_path, "Which word is written?")
    assert frames.stdout == f"a.png: {answer}\nb.png: {answer}\n"
