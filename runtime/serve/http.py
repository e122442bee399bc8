"""Bodies in, JSON out, who may ask: what every path shares, as plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from vlmtrim.runtime.serve.errors import FAILED, ApiError
from vlmtrim.runtime.serve.settings import Limits
from vlmtrim.runtime.serve.wire import encoded

log = logging.getLogger("vlmtrim.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = "POST /v1/chat/completions, GET /v1/models, /health, /health/ready, /metrics, /"
OPEN_PATHS = ("/health",)  # that need no key
DISCARDED = 8  # a refused body is heard to its end up to so many times the limit, so that its sender reads the answer
GONE = 499  # a client that went away, in log and metrics


class Gone(Exception):
    """The client went away."""


def headers_of(scope: Scope) -> dict[str, str]:
    """Names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def send_json(send: Send, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    """A whole response."""
    body = encoded(value)
    own = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": raw(own)})
    await send({"type": "http.response.body", "body": body})


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """As ASGI takes them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a JSON request, of bounded size and time. Raises ApiError, or Gone."""
    headers = headers_of(scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type is not application/json; send JSON, with that header")
    said = headers.get("content-length", "0")
    too_long = int(said) > limits.body_bytes if said.isascii() and said.isdigit() and len(said) < 20 else True
    try:
        async with asyncio.timeout(limits.body_seconds):
            body, whole = bytearray(), False
            while not whole and not too_long:
                part, whole = await _part(receive)
                body += part
                too_long = len(body) > limits.body_bytes
            if not too_long:
                return bytes(body)
            del body
            if "expect" not in headers:  # curl waits to be told to go on
                await _discard(receive, DISCARDED * limits.body_bytes)
    except TimeoutError as error:
        if not too_long:
            raise ApiError(
                408, f"the body did not arrive within {limits.body_seconds:g} seconds; send it at once"
            ) from error
    raise ApiError(
        413, f"the body has more than {limits.body_bytes} bytes; send fewer or smaller pictures", code="body_too_large"
    )


async def _part(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Gone
    return message.get("body", b""), not message.get("more_body", False)


async def _discard(receive: Receive, most: int) -> None:
    whole = False
    while not whole and most > 0:
        part, whole = await _part(receive)
        most -= len(part)


class Watch:
    """Hears while an answer is made whether the client is still there; ``gone`` says so, ``leave`` is called then."""

    def __init__(self, receive: Receive):
        self._receive, self.gone = receive, False
        self._leave: list[Callable[[], None]] = []

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._hear())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def on_leave(self, leave: Callable[[], None]) -> None:
        """Call this when the client goes away, or now where it has."""
        self._leave.append(leave)
        if self.gone:
            leave()

    async def _hear(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        for leave in self._leave:
            leave()


class Guard:
    """Around every path: the key, and errors in OpenAI's shape whatever happens."""

    def __init__(self, app: App, key: str | None):
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = False
        scope["app"] = self  # where there is one, Starlette's router raises errors in place of answering in plain text

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS and not self._may(headers_of(scope).get("authorization", "")):
                raise ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", None, "invalid_api_key"
                )
            await self._app(scope, receive, sending)
        except ApiError as error:
            if not started:
                await send_json(send, error.status, error.body(), error.headers())
        except HTTPException as error:
            said = "this path takes another method" if error.status_code == 405 else "there is no such path"
            missing = ApiError(404, f"{said}; there are {PATHS}", code="not_found")
            await send_json(send, error.status_code, missing.body())
        except (Gone, OSError):
            pass  # nobody is there to be told
        except Exception as error:
            # The message of an unforeseen error may hold what a client sent: its type alone is logged.
            log.error("%s %s failed: %s", scope["method"], scope["path"], type(error).__name__)
            log.debug("where", exc_info=error)
            if not started:
                await send_json(send, 500, ApiError(500, FAILED, code="internal_error").body())

    def _may(self, authorization: str) -> bool:
        """A bearer's key, or the password of a browser's login."""
        if self._key is None:
            return True
        kind, _, given = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), self._key.encode())
