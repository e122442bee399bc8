"""run-vlm as a process: what it reads, what it prints, and how it ends when nobody reads on."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest

from vlmtrim.runtime import cli
from vlmtrim.runtime.terminal import harmless

RUN = [sys.executable, "-m", "vlmtrim.runtime.cli"]


def run(*argv: object, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*RUN, *map(str, argv)], capture_output=True, timeout=60, **kwargs)


class Stdin(io.TextIOWrapper):
    """Standard input that is no terminal."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))


def test_the_prompt_comes_from_stdin(fastv_bundle, monkeypatch, capsys):
    argv = [str(fastv_bundle), "--max-new-tokens", "4", "--json"]
    assert cli.main([*argv, "--prompt", "Which word?"]) == 0
    expected = json.loads(capsys.readouterr().out)["token_ids"]
    monkeypatch.setattr(sys, "stdin", Stdin(b"Which word?"))
    assert cli.main([*argv, "--prompt", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected


@pytest.mark.parametrize(
    ("argv", "stdin", "says"),
    [
        (["--prompt", "-"], b"Which \xff\xfe word", "the prompt on stdin is no UTF-8 text"),
        (["--prompt", "-", "--image", "-"], b"", "stdin cannot be both|which is empty"),
        ([], b"", "no --prompt is given, and stdin is no terminal"),
        (["--json"], b"", "--json and --show-kept are of one answer"),
        (["--prompt", ""], b"", "the prompt is empty"),
        (["--prompt", "a\udcff"], b"", "lone surrogate"),
        (["--prompt", "a", "--threads", "-1"], b"", "--threads is -1"),
        (["--prompt", "a", "--stop", ""], b"", "a stop text is ''"),
        (["--prompt", "a", "--image", "https://example.com/a.png"], b"", "https"),
        (["--prompt", "a", "--temperature", "nan"], b"", "temperature is nan"),
        (["--prompt", "a", "--max-new-tokens", "0"], b"", "max_new_tokens is 0"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(fastv_bundle, monkeypatch, capsys, argv, stdin, says):
    import re

    monkeypatch.setattr(sys, "stdin", Stdin(stdin))
    assert cli.main([str(fastv_bundle), *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("run-vlm: ") and "\n" not in said and re.search(says, said)


def test_a_closed_pipe_ends_it_quietly(fastv_bundle):
    """Finding 14."""
    for extra in ([], ["--json"]):
        argv = [*RUN, str(fastv_bundle), "--prompt", "Tell me", "--max-new-tokens", "50", *extra]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, timeout=60)
        os.close(write)
        assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_told_in_a_sentence(fastv_bundle):
    with open("/dev/full", "wb") as full:
        argv = [*RUN, str(fastv_bundle), "--prompt", "Tell me", "--max-new-tokens", "4", "--json"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == b"run-vlm: the answer cannot be written (No space left on device)"


def test_why_the_answer_ended_is_told(fastv_bundle, capsys):
    assert cli.main([str(fastv_bundle), "--prompt", "Tell me", "--max-new-tokens", "2"]) == 0
    assert "(ort-cpu; cut after --max-new-tokens)" in capsys.readouterr().err


def test_verbose_tells_why_other_backends_are_passed_over(fastv_bundle, capsys):
    assert cli.main([str(fastv_bundle), "--prompt", "Hi", "--max-new-tokens", "1", "--verbose", "--verify"]) == 0
    assert "backend ort-cpu; not tensorrt: " in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    import importlib.metadata

    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vlmtrim {importlib.metadata.version('vlmtrim')}\n"


def test_control_characters_are_written_out_for_terminals():
    assert harmless("a\x1b[2Jb\x07\n\tc\x9b\u202e") == "a\\x1b[2Jb\\x07\n\tc\\x9b\\u202e"


def test_a_conversation_in_a_terminal(fastv_bundle, picture):
    """Asked as a person would, through a pseudo-terminal: a picture, a question, a reset, a mistake, the end."""
    lines = [f"/image {picture}", "Which word?", "/image nowhere.png", "/help", "/reset", "And now?", "/quit"]
    master, slave = pty.openpty()
    argv = [*RUN, str(fastv_bundle), "--max-new-tokens", "3"]
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    said = b""
    for line in lines:
        said += until(master, b"> ")
        os.write(master, line.encode() + b"\n")
    said += until(master, None)
    assert process.wait(30) == 0
    assert said.count(b"> ") >= len(lines)
    assert b"no picture at" in said and b"/reset" in said


def until(master: int, mark: bytes | None) -> bytes:
    """What the terminal shows until a mark, or the end."""
    said, start = b"", time.monotonic()
    while (mark is None or not said.endswith(mark)) and time.monotonic() - start < 40:
        try:
            data = os.read(master, 1024)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        said += data
    return said
