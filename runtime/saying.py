"""One row's answer while it is said: tokens become text, and end it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vlmtrim.runtime.prompt import Prompter
from vlmtrim.runtime.stopping import Stopper


class Saying:
    """An answer from its first token to its end.

    Args:
        prompter: of the bundle.
        eos: tokens that end it.
        limit: at most so many tokens; None for no limit.
        stops: texts that end it, which then holds what stands before them.

    Attributes:
        said: its text so far.
        tokens: how many there are so far.
    """

    def __init__(self, prompter: Prompter, eos: Collection[int], limit: int | None, stops: Sequence[str]):
        self._stream, self._stopper = prompter.decode_stream(), Stopper(stops)
        self._eos, self._limit = eos, limit
        self.said, self.tokens = "", 0

    def take(self, token: int, room: int) -> tuple[str, str | None]:
        """The next token.

        Args:
            token: its id.
            room: tokens that the row's caches can still take.

        Returns:
            What it adds to the text (it may be empty while bytes do not form a character yet, or while what was said
            may become a stop text), and why the answer ends with it: ``eos``, ``stop``, ``length`` or ``capacity``;
            None while it goes on.
        """
        self.tokens += 1
        reason = None
        if token in self._eos:
            reason = "eos"
        elif self.tokens == self._limit:
            reason = "length"
        elif room < 1:
            reason = "capacity"
        new = "" if reason == "eos" else self._stream.step(token)
        text, stopped = self._stopper.take(new, last=reason is not None)
        self.said += text
        return text, "stop" if stopped else reason

    def rest(self) -> str:
        """What was held back of an answer that is cut short."""
        text, _ = self._stopper.take("", last=True)
        self.said += text
        return text
