"""An engine that says what it is told, for tests of queue, failures and disconnects: no model, no weights.

The last message says what happens: ``say 5`` gives five tokens, ``fail`` an answer that fails after its first token,
``refuse`` one that fails before it, ``crash`` an error of no known kind, ``break`` ends the engine.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Prompt
from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.session import Prefill
from vlmtrim.runtime.slots import Busy, Closed, Request, Token

PREFILL = Prefill(np.zeros((1, 4), np.float32), 0, 0, None, np.zeros((1, 0), np.int64), None)


@dataclass(frozen=True)
class State:
    slots: int
    live: int
    waiting: int
    cache_usage: float = 0.25


@dataclass(frozen=True)
class Script(Request):
    """A request that remembers its words."""

    words: str = ""


class Times:
    queued, prefill, decode = 0.001, 0.002, 0.003


class Answer:
    prefill, times = PREFILL, Times()

    def __init__(self, request: Script):
        self.request, self.given = request, deque()
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aiter__(self):
        while True:
            while not self.given:
                await asyncio.sleep(0.001)
            token = self.given.popleft()
            if isinstance(token, Exception):
                raise token
            yield token
            if token.ended is not None:
                return


class Engine:
    """Answers in ``slots`` threads; ``held`` keeps every token back until it is set, ``pace`` is seconds a token."""

    def __init__(self, slots: int = 2, queue: int = 100, pace: float = 0.0):
        self.slots, self.queue, self.pace = slots, queue, pace
        self.held = threading.Event()
        self.held.set()
        self.waiting: deque[Answer] = deque()
        self.changed = threading.Condition()
        self.live = self.most_live = 0
        self.open = True
        self.prepared: list[list] = []
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(slots)]
        for thread in self.threads:
            thread.start()

    def prepare(self, messages, *, max_new_tokens=None, sampling=None, stop=(), top_logprobs=None) -> Script:
        self.prepared.append(list(messages))
        content = messages[-1].content
        words = " ".join(p for p in content.parts if isinstance(p, str)) if isinstance(content, Prompt) else content
        if words.startswith("too long"):
            raise RuntimeRefusal("the prompt has 9999 tokens; shorten it")
        ids = tuple(range(len(words)))
        return Script(ids, None, max_new_tokens, sampling or Sampling(), tuple(stop), top_logprobs, 0, words=words)

    def submit(self, request: Script) -> Answer:
        with self.changed:
            if not self.open:
                raise Closed("the engine is closed")
            if len(self.waiting) >= self.queue + self.slots - self.live:  # those that a free slot will take, too
                raise Busy("full")
            answer = Answer(request)
            self.waiting.append(answer)
            self.changed.notify()
            return answer

    def state(self) -> State:
        return State(self.slots, self.live, len(self.waiting))

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(5)

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or not self.open)
                if not self.open:
                    return
                answer = self.waiting.popleft()
                self.live += 1
                self.most_live = max(self.most_live, self.live)
            try:
                self._answer(answer)
            finally:
                with self.changed:
                    self.live -= 1

    def _answer(self, answer: Answer) -> None:
        words = answer.request.words.split()
        verb, count = words[0], int(words[1]) if len(words) > 1 and words[1].isdigit() else 3
        errors = {"refuse": RuntimeRefusal("the model returned NaN"), "crash": ValueError("secret /etc/passwd 0x7f")}
        if verb in errors:
            answer.given.append(errors[verb])
            return
        if verb == "break":
            self.open = False
            answer.given.append(Closed("the backend broke at /secret/place"))
            return
        for index in range(count):
            while not self.held.wait(0.005) and not answer.cancelled.is_set():
                pass
            time.sleep(self.pace)
            if answer.cancelled.is_set():
                answer.given.append(Token(index, -1, "", "cancelled"))
                return
            if verb == "fail" and index == 1:
                answer.given.append(RuntimeRefusal("the model returned NaN"))
                return
            last = "eos" if index == count - 1 else None
            wanted = answer.request.top_logprobs
            top = tuple((index + n, -1.0 - n) for n in range(wanted or 0))
            text = "" if last else f"{index} "
            answer.given.append(Token(index, index, text, last, None if wanted is None else -1.0, top))
