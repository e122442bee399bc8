"""An answer on its way from the engine's thread to whoever listens: a thread, or an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from vlmtrim.runtime.results import Prefill
from vlmtrim.runtime.slots.request import Request

CANCELLED = "cancelled"
NO_TOKEN = -1


@dataclass(frozen=True)
class Token:
    """What an answer grew by.

    Attributes:
        index: 0 for the first token.
        token_id: NO_TOKEN at the end of an answer that was cancelled.
        text: what it adds; may be empty while bytes do not form a character yet, or while what was said may become a
            stop text.
        ended: why the answer ended with it: ``eos``, ``stop``, ``length``, ``capacity`` or ``cancelled``; None while it
            goes on.
        logprob: natural logarithm of the model's probability of it, before temperature, top-k and top-p; None unless
            asked for.
        top: the likeliest tokens and theirs, in falling order.
    """

    index: int
    token_id: int
    text: str
    ended: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class AnswerTimes:
    """Seconds that an answer waited for its slot, that its prefill took (pictures included), and from its first token
    to its last so far."""

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


class Answer:
    """Tokens of one answer, each once: ``for token in answer`` on a thread, ``async for token in answer`` in a loop.

    Where the request fails, iterating raises the error after the tokens that came before it.

    Attributes:
        request: what is answered.
        prefill: what the prefill did; None before the first token.
        times: so far.
    """

    def __init__(self, request: Request, forget: Callable[[Answer], None]):
        self.request = request
        self.prefill: Prefill | None = None
        self.times = AnswerTimes()
        self._forget = forget
        self._changed = threading.Condition()
        self._tokens: deque[Token] = deque()
        self._over = self._cancelled = False
        self._error: BaseException | None = None
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def cancel(self) -> None:
        """End it, from any thread at any time; its slot is free before the next step. Twice is once."""
        self._cancelled = True
        self._forget(self)

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancelled it."""
        return self._cancelled

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        with self._changed:
            self._changed.wait_for(lambda: self._tokens or self._over)
            if (token := self._take()) is not None:
                return token
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        while True:
            with self._changed:
                if (token := self._take()) is not None:
                    return token
                if self._over:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                awake = loop.create_future()
                self._sleepers.append((loop, awake))
            await awake

    def _take(self) -> Token | None:
        if self._tokens:
            return self._tokens.popleft()
        if self._error is not None:
            raise self._error
        return None

    def put(self, token: Token) -> None:
        """The engine's next token; one that ended it is the last."""
        with self._changed:
            if self._over:
                return
            self._tokens.append(token)
            self._over = token.ended is not None
            self._wake()

    def fail(self, error: BaseException) -> None:
        """The engine cannot go on with it."""
        with self._changed:
            if self._over:
                return
            self._over, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        for loop, awake in sleepers:
            try:
                loop.call_soon_threadsafe(_set, awake)
            except RuntimeError:  # the loop is closed: nobody listens there any more
                continue


def _set(awake: asyncio.Future[None]) -> None:
    if not awake.done():
        awake.set_result(None)
