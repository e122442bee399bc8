"""The routes, as one ASGI application; what they need is the engine's client, never the engine."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router

from vlmtrim.runtime.serve.chat import ChatCompletions
from vlmtrim.runtime.serve.client import FAILED, READY, EngineClient
from vlmtrim.runtime.serve.errors import ApiError
from vlmtrim.runtime.serve.http import App, Guard
from vlmtrim.runtime.serve.wire import encoded


def make_app(client: EngineClient) -> App:
    """An ASGI application around a client of the engine, which the caller opens and closes."""
    routes = Routes(client)
    router = Router(
        [
            Route("/v1/chat/completions", ChatCompletions(client), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
            Route("/health/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/", routes.page),
        ]
    )
    return Guard(router, client.settings.key)


class Routes:
    """All paths but the one that answers."""

    def __init__(self, client: EngineClient):
        self._client, self._created = client, int(time.time())
        self._page, self._policy = _page()

    async def models(self, _: Request) -> Response:
        """The one model."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """By its name."""
        if request.path_params["name"] != self._client.settings.name:
            raise ApiError(404, "there is no model of that name here; see GET /v1/models", "model", "model_not_found")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        contract, limits = self._client.bundle.contract, self._client.settings.limits
        own = {
            "family": contract.family,
            "selection": contract.selection,
            "shows_kept": contract.image_grid is not None,
            "max_body_bytes": limits.body_bytes,
            "max_images": limits.images,
        }
        name = self._client.settings.name
        head = {"id": name, "object": "model", "created": self._created, "owned_by": "vlmtrim"}
        return head | {"max_model_len": contract.max_seq_len, "vlmtrim": own}

    async def health(self, _: Request) -> Response:
        """200 while the process should live."""
        failed = self._client.status == FAILED
        return _json({"status": self._client.status}, 503 if failed else 200)

    async def ready(self, _: Request) -> Response:
        """200 while requests are taken; counts of slots and queue."""
        state, status = self._client.state(), self._client.status
        counts = {} if state is None else {"slots": state.slots, "live": state.live, "waiting": state.waiting}
        return _json({"status": status, **counts}, 200 if status == READY else 503)

    async def metrics(self, _: Request) -> Response:
        """For Prometheus."""
        return Response(self._client.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def page(self, _: Request) -> Response:
        """To try it with."""
        headers = {"content-security-policy": self._policy, "x-content-type-options": "nosniff"}
        return HTMLResponse(self._page, headers=headers | {"referrer-policy": "no-referrer"})


def _page() -> tuple[str, str]:
    """The page, and a policy under which its own script alone runs and nothing else is loaded."""
    text = files("vlmtrim.runtime.serve").joinpath("page.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    return text, policy + "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _json(value: Any, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")
