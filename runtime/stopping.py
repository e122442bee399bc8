"""Texts that end an answer, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtrim.runtime.errors import RuntimeRefusal


class Stopper:
    """Passes text on until a stop text begins in it; holds back what may become one.

    Args:
        stops: texts that end the answer; none are allowed.
    """

    def __init__(self, stops: Sequence[str] = ()):
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RuntimeRefusal(f"a stop text is {stop!r}; give a text of one character or more")
        self._stops = tuple(stops)
        self._held = ""

    def take(self, text: str, last: bool = False) -> tuple[str, bool]:
        """(text that is certain now, whether a stop text was found); ``last`` lets everything out that is held."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = 0 if last else max((_beginning(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, False


def _beginning(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if stop.startswith(text[-length:])), 0)
