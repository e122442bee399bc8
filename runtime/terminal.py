"""What goes to a terminal: control characters of an answer are shown, not obeyed; a closed pipe is a quiet end."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

# C0 and C1 controls but tab and newline, and what turns the direction of text around (Unicode TR 36).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports it of other programs


class OutputError(Exception):
    """Standard output does not take the answer; ``status`` is the command's exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def harmless(text: str) -> str:
    """Text whose control characters are written out, e.g. ``\\x1b``."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(text: str) -> None:
    """Print at once; control characters are written out where a terminal would obey them. Raises OutputError."""
    with _closed_pipes():
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


@contextlib.contextmanager
def _closed_pipes() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        _give_up_stdout()
        raise OutputError("", CLOSED_PIPE) from error
    except OSError as error:
        _give_up_stdout()
        raise OutputError(f"the answer cannot be written ({error.strerror})", 1) from error
    except UnicodeEncodeError as error:
        raise OutputError(f"the answer has characters that {sys.stdout.encoding} lacks; set PYTHONUTF8=1", 1) from error


def _give_up_stdout() -> None:
    """Python writes what is left when it exits, and would fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
