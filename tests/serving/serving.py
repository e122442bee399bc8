"""Servers for tests in a thread around any engine, and plain requests; processes are soak_server.started's."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from PIL import Image

from vlmtrim.runtime.serve.app import make_app
from vlmtrim.runtime.serve.client import READY, EngineClient
from vlmtrim.runtime.serve.server import listen


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream, in order; the last one as it is written."""
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
        return [part[6:] if part[6:] == "[DONE]" else json.loads(part[6:]) for part in parts[:-1]]


@dataclass
class Server:
    """An address and ways to ask it."""

    port: int
    client: EngineClient | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, None, headers)

    def send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, self.headers | headers)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"content-type": "application/json", **headers})

    def ask(self, content: Any, **fields: Any) -> Reply:
        """One question."""
        return self.post({"messages": [{"role": "user", "content": content}], **fields})

    def begin(self, content: Any, **fields: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A streamed answer whose first bytes have come."""
        connection = self.connect()
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        return connection, connection.getresponse()


def data_url(picture: Image.Image | bytes, kind: str = "PNG", **settings: Any) -> str:
    """A picture, or the bytes of something else, as a data: URL."""
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        picture = file.getvalue()
    return f"data:image/{kind.lower()};base64," + base64.b64encode(picture).decode()


def image_part(picture: Image.Image | bytes | str, kind: str = "PNG") -> dict[str, Any]:
    url = picture if isinstance(picture, str) else data_url(picture, kind)
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def eventually(condition, seconds: float = 30.0) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@contextmanager
def running(settings, bundle, engine, ready=True):
    """A server in a thread, around an engine that is there or that a function makes; ``ready`` waits for the engine."""
    client = EngineClient(settings, bundle, engine if callable(engine) else lambda: engine)
    opened = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(client), lifespan="off", ws="none", log_config=None, access_log=False)
    server = uvicorn.Server(config)

    async def live() -> None:
        serving = asyncio.create_task(server.serve(sockets=[opened]))
        await client.start()
        await serving
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    port = opened.getsockname()[1]
    thread.start()
    try:
        eventually(lambda: server.started and (not ready or client.status == READY))
        yield Server(port, client)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
