"""Runs the application: a socket, uvicorn, the engine opened beside it, and an orderly end by signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from vlmtrim.graphs.bundle import BundleError
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.serve.app import make_app
from vlmtrim.runtime.serve.client import EngineClient

log = logging.getLogger("vlmtrim.serve")

CONNECTIONS = 512  # open at once, at most; uvicorn answers 503 beyond


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RuntimeRefusal."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(128)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "no such address"
        raise RuntimeRefusal(f"cannot listen on {host} port {port} ({why}); give another --host or --port") from error
    return opened


def serve(client: EngineClient, opened: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM. Raises RuntimeRefusal or BundleError where the engine cannot be opened."""
    config = uvicorn.Config(
        make_app(client),
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, client)
    asyncio.run(server.serve(sockets=[opened]))
    if server.failure is not None:
        raise server.failure


class _Server(uvicorn.Server):
    """Opens the engine once the socket is served; the first signal lets answers end, the second ends at once."""

    def __init__(self, config: uvicorn.Config, client: EngineClient):
        super().__init__(config)
        self._client = client
        self.failure: RuntimeRefusal | BundleError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and open the engine at the same time: until it is there, requests are answered 503."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tasks.append(self._loop.create_task(self._open()))

    async def _open(self) -> None:
        try:
            await self._client.start()
        except (RuntimeRefusal, BundleError) as failure:
            self.failure, self.should_exit = failure, True
            return
        where = self.servers[0].sockets[0].getsockname()
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        name, slots = self._client.settings.name, self._client.slots
        print(f"serve-vlm: {name} is ready on http://{host}:{where[1]} ({slots} slots)", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: new requests are refused, those inside get the grace time."""
        if self._tasks and len(self._tasks) == 1 and sig in (signal.SIGINT, signal.SIGTERM):
            self._loop.call_soon_threadsafe(lambda: self._tasks.append(self._loop.create_task(self._end())))
            return
        self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        log.info("shutting down")
        await self._client.close()
        self.should_exit = True
