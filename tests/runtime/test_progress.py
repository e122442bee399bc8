"""Progress is shown on a terminal, of work that takes long, and nowhere else."""

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from contextlib import contextmanager, suppress

import pytest

from vlmtrim.runtime import progress


@contextmanager
def terminal():
    """A terminal as stderr; gives what reads that which was written there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    os.set_blocking(ours, False)

    def written():
        data = b""
        with suppress(BlockingIOError):
            while True:
                data += os.read(ours, 1 << 16)
        return data.decode(errors="replace")

    with os.fdopen(theirs, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(progress, "DELAY", 0.05)
        patch.setattr(progress, "_INTERVAL", 0.05)
        yield written
    os.close(ours)


def test_bytes_are_a_bar_and_its_line_is_cleared():
    with terminal() as written:
        with progress.running("copying") as show:
            for done in range(1, 5):
                show(done * 10**9, 4 * 10**9)
                time.sleep(0.2)
        said = written()
    assert "copying:  75%" in said and "3.00G/4.00G" in said
    assert said.endswith("\r")


def test_work_of_unknown_length_shows_its_time():
    with terminal() as written:
        with progress.running("tracing"):
            time.sleep(0.3)
        assert "tracing: 00:00" in written()


def test_short_work_is_silent():
    with terminal() as written:
        with progress.running("tracing") as show:
            show(1, 1)
        assert written() == ""


def test_an_exception_ends_the_bar():
    with terminal() as written:
        with pytest.raises(RuntimeError), progress.running("copying") as show:
            show(1, 2)
            time.sleep(0.3)
            raise RuntimeError
        assert written().endswith("\r")


def test_nothing_is_written_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.running("copying") as show:
        show(1, 2)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
