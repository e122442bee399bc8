"""The way from HTTP to an engine: who is let in, what happens off its thread, how answers end.

At most ``slots + queue`` requests are inside at any time, from the first byte of a body to the last of its answer, so
bodies and pictures in memory are bounded.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Tokenizer

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import View, load_processor
from vlmtrim.runtime.serve import content, schema
from vlmtrim.runtime.serve.errors import ApiError
from vlmtrim.runtime.serve.metrics import Metrics
from vlmtrim.runtime.serve.overlay import views_of
from vlmtrim.runtime.serve.settings import Settings
from vlmtrim.runtime.slots import Answer, Busy, Closed, Engine, Request, State
from vlmtrim.runtime.tokenizing import load

log = logging.getLogger("vlmtrim.serve")

STARTING, READY, DRAINING, FAILED = "starting", "ready", "draining", "failed"
UNREADY = {
    STARTING: "the model is being opened; try again in a moment",
    DRAINING: "the server is shutting down; ask another one, or try again later",
    FAILED: "the engine has stopped; the server must be restarted",
}
WORKERS = 4  # threads that read bodies and decode pictures, at most


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for a slot."""

    ask: schema.Ask
    request: Request
    views: list[View]


class EngineClient:
    """One engine's admission, preparation and end; all methods but :meth:`prepare`'s work run on the event loop.

    Args:
        settings: of the server.
        bundle: that the engine runs.
        open_engine: makes the engine; called once, off the event loop.
    """

    def __init__(self, settings: Settings, bundle: Bundle, open_engine: Callable[[], Engine]):
        self.settings, self.bundle = settings, bundle
        self.status = STARTING
        self.failure: RuntimeRefusal | None = None
        self.metrics = Metrics(settings.name, self.state)
        self._open_engine = open_engine
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        self._inside = 0
        self._answers: set[Answer] = set()
        workers = min(WORKERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vlmtrim-prepare")

    async def start(self) -> None:
        """Open the engine; requests are answered 503 until it is ready. Raises RuntimeRefusal or BundleError."""
        loop = asyncio.get_running_loop()
        self._processor = await loop.run_in_executor(
            self._pool, lambda: load_processor(self.bundle.files, self.bundle.contract)
        )
        self._engine = await loop.run_in_executor(self._pool, self._open_engine)
        if self.status == STARTING:
            self.status = READY

    async def close(self) -> None:
        """Take no more requests, let answers end within the grace time, cancel the others, free the engine."""
        self.status = DRAINING
        await self._emptied(self.settings.grace)
        for answer in list(self._answers):
            answer.cancel()
        await self._emptied(5.0)
        if self._engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.close)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _emptied(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while self._inside and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def state(self) -> State | None:
        """Of the engine; None while there is none."""
        return None if self._engine is None else self._engine.state()

    @property
    def slots(self) -> int:
        """Requests that are answered at once; 0 while there is no engine."""
        state = self.state()
        return 0 if state is None else state.slots

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the ``slots + queue``. Raises ApiError 503 or 429."""
        if self.status != READY:
            raise ApiError(503, UNREADY[self.status], code=self.status)
        most = self.slots + self.settings.queue
        if self._inside >= most:
            raise ApiError(429, f"{most} requests are being answered or wait; try again in a moment", code="queue_full")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def prepare(self, body: bytes) -> Prepared:
        """A body, read in a thread of the pool: JSON, base64, pictures, template, tokens. Raises ApiError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, body)

    def _prepare(self, body: bytes) -> Prepared:
        ask = schema.read(body, self.settings.limits.messages)
        if ask.model is not None and ask.model != self.settings.name:
            raise ApiError(
                404, f"there is no model of that name here; there is {self.settings.name}", "model", "model_not_found"
            )
        messages, pictures = content.messages(ask.turns, self.settings.limits)
        assert self._engine is not None
        try:
            request = self._engine.prepare(
                messages,
                max_new_tokens=ask.max_new_tokens,
                sampling=ask.sampling,
                stop=ask.stop,
                top_logprobs=ask.top_logprobs,
            )
        except RuntimeRefusal as refusal:
            raise ApiError(400, self._public(refusal), "messages", "invalid_prompt") from refusal
        if ask.top_logprobs is not None and self._tokenizer is None:
            source = self.bundle.files.bytes("tokenizer.json")
            self._tokenizer = load(source, str(self.bundle.folder))
        return Prepared(ask, request, views_of(self._processor, pictures) if ask.show_kept else [])

    @contextmanager
    def answering(self, prepared: Prepared) -> Iterator[Answer]:
        """An answer, cancelled where it is left before its end. Raises ApiError."""
        assert self._engine is not None
        try:
            answer = self._engine.submit(prepared.request)
        except Busy as busy:
            raise ApiError(429, "every place is taken; try again in a moment", code="queue_full") from busy
        except Closed as closed:
            raise self._stopped() from closed
        self._answers.add(answer)
        try:
            yield answer
        except Closed as closed:
            raise self._stopped() from closed
        except RuntimeRefusal as refusal:
            raise ApiError(500, self._public(refusal), code="answer_failed") from refusal
        finally:
            self._answers.discard(answer)
            answer.cancel()

    def _stopped(self) -> ApiError:
        if self.status == READY:
            self.status = FAILED
            log.error("the engine has stopped; requests are refused from now on")
        return ApiError(503, UNREADY[self.status], code=self.status)

    def _public(self, refusal: RuntimeRefusal) -> str:
        """A refusal without the places of files on this machine."""
        return str(refusal).replace(str(self.bundle.folder), "the bundle")

    def token_text(self, token: int) -> str:
        """What a token is alone, for log-probabilities; of a request that asked for them."""
        assert self._tokenizer is not None
        # Said twice, because a tokenizer may take away the space that a text begins with.
        once, twice = (self._tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
        return twice[len(once) :]
