"""An exported bundle on ONNX Runtime's CPU; load: ``bundle``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import wire
from PIL import Image

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.measure.watch import Run, watch
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import choose_backend
from vlmtrim.runtime.session import Session


def load(request: dict[str, Any]) -> Any:
    bundle = open_bundle(request["bundle"])
    spent: dict[str, float] = {}

    def clock(graph: str, feeds: Mapping[str, Any], run: Run) -> dict[str, Any]:
        start = time.perf_counter()
        outputs = run(feeds)
        spent.setdefault(graph, time.perf_counter() - start)
        return outputs

    session = Session(bundle, watch(choose_backend("ort-cpu", bundle, threads=wire.THREADS), clock))

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        turn = request["turn"]
        picture = Image.frombytes("RGB", *wire.picture(request))
        session.reset()
        spent.clear()
        seen: dict[str, int] = {}
        said: list[Any] = []

        def tokens() -> Iterator[Any]:
            pictures = session.processor([picture])
            asked = Conversation(session.prompter).ask(wire.question(turn), 1)
            ids = session.prompter.expand_images(asked, pictures.tokens)
            prefill = session.prefill([ids], pictures)
            seen.update(tokens=len(ids), visual=prefill.visual, kept=prefill.kept)
            said.append(token := prefill.logits.argmax(axis=1))
            yield
            for _ in range(request["new_tokens"] - 1):
                said.append(token := session.decode(token).argmax(axis=1))
                yield

        found = wire.timed(time.perf_counter(), tokens())
        text = session.prompter.tokenizer.decode([int(token[0]) for token in said], skip_special_tokens=False)
        return {**found, **seen, "text": text, "vision": spent["vision"], "prefill": spent["decoder"]}

    return ask


if __name__ == "__main__":
    wire.serve(load)
