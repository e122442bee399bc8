"""A conversation in the terminal: run-vlm without --prompt."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from vlmtrim.graphs.bundle import BundleError
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Chat
from vlmtrim.runtime.guided import Guided
from vlmtrim.runtime.image import picture_argument
from vlmtrim.runtime.terminal import harmless, write
from vlmtrim.runtime.video import load_picture

HELP = """\
/image FILE   a picture for the next question; repeat for several
/reset        a new conversation
/help         this
/quit         the end, as Ctrl-D
Ctrl-C ends an answer early."""


def converse(chat: Chat | Guided, system: str, pictures: list[Any], settings: Mapping[str, Any]) -> int:
    """Ask what is typed until the end of input; returns the exit status.

    Args:
        chat: a new conversation.
        system: what stands before the first question, after /reset too.
        pictures: of the first question.
        settings: keyword arguments of :meth:`Chat.generate`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() editing and history
    print("Ask about pictures; /help tells how.", file=sys.stderr)
    waiting = list(pictures)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return 0
        except KeyboardInterrupt:
            write("\n")
            continue
        try:
            if line in ("/quit", "/exit"):
                return 0
            waiting = (
                _obey(chat, system, line, waiting) if line.startswith("/") else _ask(chat, line, waiting, settings)
            )
        except (BundleError, RuntimeRefusal) as refusal:
            print(harmless(str(refusal)), file=sys.stderr)


def _obey(chat: Chat | Guided, system: str, line: str, waiting: list[Any]) -> list[Any]:
    """Carry out a command; returns the pictures that wait for the next question."""
    command, _, rest = line.partition(" ")
    if command == "/image" and rest.strip():
        picture = load_picture(picture_argument(rest.strip()))  # now, so that a wrong name is told now
        return [*waiting, picture]
    if command == "/reset":
        chat.reset(system)
        return []
    print(HELP, file=sys.stderr)
    return waiting


def _ask(chat: Chat | Guided, line: str, waiting: list[Any], settings: Mapping[str, Any]) -> list[Any]:
    if not line and not waiting:
        return waiting
    with contextlib.suppress(KeyboardInterrupt):
        for step in chat.generate(line, waiting, **settings):
            write(step.text)
    write("\n")
    return []
