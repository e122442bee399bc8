"""POST /v1/chat/completions: one request from its body to the end of its answer, whole or streamed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vlmtrim.runtime.serve import wire
from vlmtrim.runtime.serve.client import EngineClient, Prepared
from vlmtrim.runtime.serve.errors import FAILED, ApiError
from vlmtrim.runtime.serve.http import GONE, Gone, Receive, Scope, Send, Watch, raw, read_body, send_json
from vlmtrim.runtime.serve.overlay import overlay
from vlmtrim.runtime.slots import Answer, Token

log = logging.getLogger("vlmtrim.serve")

STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
CUT = "the server is shutting down and has cut the answer; ask another one, or try again later"


@dataclass
class _Clock:
    """When things happened to one request, in seconds since it arrived."""

    began: float = field(default_factory=time.perf_counter)
    last: float | None = None
    tokens: int = 0

    def token(self, client: EngineClient) -> None:
        """Another token is there."""
        now = time.perf_counter()
        if self.last is None:
            client.metrics.first_token.observe(now - self.began)
        else:
            client.metrics.between_tokens.observe(now - self.last)
        self.last, self.tokens = now, self.tokens + 1

    def seconds(self) -> float:
        """Up to now."""
        return time.perf_counter() - self.began


class ChatCompletions:
    """The route, as an ASGI application."""

    def __init__(self, client: EngineClient):
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what it holds is never logged."""
        client, clock, head = self._client, _Clock(), wire.Head(self._client.settings.name)
        status, why = 200, ""
        try:
            with client.admitted():
                body = await read_body(scope, receive, client.settings.limits)
                async with Watch(receive) as watch:
                    prepared = await client.prepare(body)
                    del body
                    with client.answering(prepared) as answer:
                        watch.on_leave(answer.cancel)
                        why = await self._answer(_Exchange(client, clock, head, prepared, answer, watch), send)
        except ApiError as error:
            status, why = error.status, error.code or ""
            raise
        except (Gone, OSError, asyncio.CancelledError):  # Ray Serve cancels the task of a client that is gone
            status, why = GONE, "the client went away"
            raise
        except Exception:
            status, why = 500, "failed"
            raise
        finally:
            if status != 200:
                client.metrics.refused(status)
            log.info("%s %d %s, %d tokens, %.3f s", head.id, status, why, clock.tokens, clock.seconds())

    async def _answer(self, exchange: _Exchange, send: Send) -> str:
        if exchange.prepared.ask.stream:
            return await exchange.stream(send)
        return await exchange.whole(send)


@dataclass
class _Exchange:
    """What belongs to one answer while it is made."""

    client: EngineClient
    clock: _Clock
    head: wire.Head
    prepared: Prepared
    answer: Answer
    watch: Watch

    async def tokens(self) -> AsyncIterator[Token]:
        """Of the answer. Raises Gone or ApiError where it was cancelled."""
        async for token in self.answer:
            if token.ended == "cancelled":
                break
            self.clock.token(self.client)
            yield token
            if token.ended is not None:
                return
        if self.watch.gone:
            raise Gone
        raise ApiError(503, CUT, code="draining")

    async def whole(self, send: Send) -> str:
        """One object; returns why the answer ended."""
        tokens = [token async for token in self.tokens()]
        finish = wire.FINISHED[str(tokens[-1].ended)]
        text = "".join(token.text for token in tokens)
        logprobs = wire.logprobs(tokens, self.client.token_text)
        whole = wire.completion(self.head, text, finish, logprobs, self._ended(finish)) | self._overlay()
        await send_json(send, 200, whole, {"x-request-id": self.head.id})
        return finish

    async def stream(self, send: Send) -> str:
        """Server-sent events; the first one, and the status with it, when the first token is there."""
        finish: str | None = None
        try:
            async for token in self.tokens():
                if token.index == 0:
                    headers = raw(STREAM | {"x-request-id": self.head.id})
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await self._say(send, wire.event(self._chunk({"role": "assistant", "content": ""})))
                logprobs = wire.logprobs([token], self.client.token_text)
                if token.text or (logprobs and logprobs["content"]):
                    await self._say(send, wire.event(self._chunk({"content": token.text}, logprobs=logprobs)))
                finish = None if token.ended is None else wire.FINISHED[token.ended]
            assert finish is not None
            await self._say(send, wire.event(self._chunk({}, finish) | self._overlay()))
            used = self._ended(finish)
            if self.prepared.ask.include_usage:
                last = self.head.of("chat.completion.chunk") | {"choices": [], "usage": used}
                await self._say(send, wire.event(last))
            await self._say(send, wire.DONE, more=False)
        except ApiError as error:
            await self._fail(send, error)
            raise
        except (Gone, OSError):
            raise
        except Exception:
            await self._fail(send, ApiError(500, FAILED, code="internal_error"))
            raise
        return finish

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        """With ``usage: null`` where the last chunk of all will have it, as OpenAI does."""
        made = wire.chunk(self.head, delta, finish, logprobs)
        return made | {"usage": None} if self.prepared.ask.include_usage else made

    async def _fail(self, send: Send, error: ApiError) -> None:
        """An error in the middle of a stream is its last event: the status has gone out long before."""
        if self.clock.tokens:
            await self._say(send, wire.event(error.body()), more=False)

    @staticmethod
    async def _say(send: Send, data: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": more})

    def _ended(self, finish: str) -> dict[str, Any]:
        """The usage, which the counters of /metrics grow by."""
        metrics, used = self.client.metrics, wire.usage(self.prepared.request, self.answer, self.clock.tokens)
        metrics.prompt_tokens.inc(used["prompt_tokens"])
        metrics.generation_tokens.inc(used["completion_tokens"])
        metrics.visual_tokens.inc(used["vlmtrim"]["visual_tokens"])
        metrics.removed_tokens.inc(used["vlmtrim"]["removed"])
        metrics.whole.observe(self.clock.seconds())
        metrics.ended(finish)
        return used

    def _overlay(self) -> dict[str, Any]:
        """What a page draws, where it was asked for."""
        if not self.prepared.ask.show_kept:
            return {}
        assert self.answer.prefill is not None
        return {"vlmtrim": overlay(self.prepared.views, self.answer.prefill)}
