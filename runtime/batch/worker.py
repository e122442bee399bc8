"""An engine in a process of its own that answers pieces of a batch; what goes wrong with a row is that row's error."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from vlmtrim.graphs.bundle import BundleError, open_bundle
from vlmtrim.runtime.batch.rows import Piece, Row, rows
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Image, Prompt
from vlmtrim.runtime.image import load_image, picture_argument
from vlmtrim.runtime.select_backend import choose_backend
from vlmtrim.runtime.slots import Answer, Closed, Engine, Message, Token

AHEAD = 2  # rows that are prepared while every slot is taken
TRIES = 3  # of a piece whose process dies
REFUSED = ""  # in the place of an id: no engine can be opened, the line says why
DIED = "the process died {} times while this row, or one beside it, was asked; ask again with --retry-errors"
STOPPED = "the engine stopped while it was asked; ask again with --retry-errors"


@dataclass(frozen=True)
class Told:
    """What every worker is told; see the arguments of batch-vlm."""

    bundle: str
    prompt: str | None
    max_new_tokens: int
    stop: tuple[str, ...]
    backend: str
    threads: int
    activations: str
    slots: int | None
    verify: bool


class Worker:
    """Called with ``{"piece": text}``, yields ``{"id", "failed", "line"}`` for each of its rows, in their order.

    Args:
        told: what every worker is told.
        tries: counts how often a piece was begun, whoever began it; says it with this time.
    """

    def __init__(self, told: Told, tries: Callable[[str], int]):
        self._told, self._tries, self._changing = told, tries, threading.Lock()
        self._refusal: str | None = None
        try:
            self._engine = self._open()
        except (BundleError, RuntimeRefusal) as refusal:  # raised here, Ray would open it again and again
            self._refusal = str(refusal)
            return
        self._ahead = self._engine.slots + AHEAD
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="vlmtrim-row")

    def _open(self) -> Engine:
        told = self._told
        bundle = open_bundle(told.bundle, told.verify)
        backend = choose_backend(told.backend, bundle, told.threads, activations=told.activations)
        return Engine(bundle, backend, slots=told.slots, queue=1000)

    def __call__(self, given: dict[str, str]) -> Iterator[dict[str, Any]]:
        """A piece's answers. Their order is that of its rows, so that what Ray does again comes out the same."""
        if self._refusal is not None:
            yield {"id": REFUSED, "failed": True, "line": self._refusal}
            return
        waiting: deque[Future[dict[str, Any]]] = deque()
        died = self._tries(given["piece"]) > TRIES
        for row in rows(Piece.of(given["piece"]), self._told.prompt):
            if died and row.error is None:
                row = replace(row, error=DIED.format(TRIES))
            waiting.append(self._pool.submit(self._answer, row))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _answer(self, row: Row) -> dict[str, Any]:
        record = {"id": row.id, "prompt": row.prompt, **dict.fromkeys(FIELDS), "error": row.error}
        engine = self._engine
        if row.error is None:
            try:
                record |= self._asked(engine, row)
            except Closed:
                record["error"] = STOPPED
                self._replace(engine)
            except RuntimeRefusal as refusal:
                record["error"] = str(refusal)
            except Exception as error:
                record["error"] = f"an unforeseen error, {type(error).__name__}: {error}"
        return {"id": row.id, "failed": record["error"] is not None, "line": json.dumps(record)}

    def _asked(self, engine: Engine, row: Row) -> dict[str, Any]:
        """Raises RuntimeRefusal."""
        pictures = [Image(load_image(picture_argument(one) if isinstance(one, str) else one)) for one in row.images]
        content = Prompt(*pictures, row.prompt) if pictures else row.prompt
        settings = {"max_new_tokens": self._told.max_new_tokens, "stop": self._told.stop}
        request = engine.prepare([Message("user", content)], **settings)
        answer = engine.submit(request)
        return told_of(answer, list(answer))

    def _replace(self, stopped: Engine) -> None:
        """Another engine in the place of one whose backend broke."""
        with self._changing:
            if self._engine is stopped:
                stopped.close()
                self._engine = self._open()


def told_of(answer: Answer, tokens: list[Token]) -> dict[str, Any]:
    """What a record says of an answer."""
    prefill, times = answer.prefill, answer.times
    assert prefill is not None
    values = ("".join(token.text for token in tokens), tokens[-1].ended, len(answer.request.ids), len(tokens))
    counts = (prefill.visual, prefill.kept, prefill.visual - prefill.kept)
    seconds = (round(value, 6) for value in (times.queued, times.prefill, times.decode))
    return dict(zip(FIELDS, (*values, *counts, *seconds), strict=True))


FIELDS = ("answer", "ended", "prompt_tokens", "answer_tokens", "visual_tokens", "kept", "removed")
FIELDS += ("queued_s", "prefill_s", "decode_s")
