"""The engine: one thread owns a backend, fills slots with requests and decodes those that are filled together.

Its loop: take cancels; where a slot is free and a request waits, prefill that one; then one decode step over all live
rows. So there is never more than one prefill between two tokens of an answer, and never a row that waits for another's
end. Live rows lie at the lowest slots, and a step runs the first of them up to the highest that is live: where an
answer ends below it and nobody waits, the highest row moves down, which copies what its caches hold.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.graphs.contract import BUNDLE
from vlmtrim.runtime.backends.base import Backend
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.sampling import Sampler, Sampling, log_probabilities
from vlmtrim.runtime.saying import Saying
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots.answer import CANCELLED, NO_TOKEN, Answer, Token
from vlmtrim.runtime.slots.request import Message, Preparer, Request
from vlmtrim.runtime.slots.rows import Rows


class Busy(RuntimeRefusal):
    """As many requests wait as may; try again later."""


class Closed(RuntimeRefusal):
    """The engine is closed, or its backend broke."""


@dataclass(frozen=True)
class State:
    """An engine at one moment, and what it has done since its start.

    Attributes:
        slots, live, waiting: slots, those that answer, and requests that wait for one.
        closed: whether it takes no requests any more.
        finished, cancelled, failed, refused: answers that ended by themselves, by :meth:`Answer.cancel` or
            :meth:`Engine.close`, with an error, and requests that found the queue full.
        prompt_tokens, visual_tokens, generated_tokens: of prefilled requests (visual tokens are among the prompt's
            where the decoder has no cross-attention), and of answers.
        prefills, steps, rows, moves: prefills, decode steps, live rows of all steps, and rows that were moved.
        cache_usage: share of the caches' bytes that live rows fill, 0 to 1.
    """

    slots: int
    live: int
    waiting: int
    closed: bool
    finished: int
    cancelled: int
    failed: int
    refused: int
    prompt_tokens: int
    visual_tokens: int
    generated_tokens: int
    prefills: int
    steps: int
    rows: int
    moves: int
    cache_usage: float


_COUNTERS = ("finished", CANCELLED, "failed", "refused", "prompt_tokens", "visual_tokens", "generated_tokens")
_COUNTERS += ("prefills", "steps", "rows", "moves")


@dataclass
class _Seat:
    """An answer that waits, or has a slot: ``since`` it was submitted, or prefilled. ``token`` is the last one said,
    which the next step feeds."""

    answer: Answer
    saying: Saying
    sampler: Sampler
    since: float
    token: int = NO_TOKEN


class Engine:
    """Answers several conversations at once, each as it would be answered alone.

    Args:
        bundle: opened by :func:`vlmtrim.graphs.bundle.open_bundle`.
        backend: of :func:`vlmtrim.runtime.make_backend`; the engine's alone from now on.
        slots: conversations that run at once; None for the largest batch of the bundle (``export-vlm --max-batch``).
        queue: requests that may wait for a slot.

    Raises:
        RuntimeRefusal: the bundle cannot run so: it is guided by another one, or the backend cannot bind single rows.

    Close it, or use it in a ``with`` statement: its thread and the memory live until then.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, slots: int | None = None, queue: int = 16):
        contract = bundle.contract
        if contract.guide == BUNDLE:
            raise RuntimeRefusal(
                "this bundle ranks visual tokens by scores of another bundle, which the engine does not run; ask with "
                "vlmtrim.runtime.Guided, or export with another --method"
            )
        if queue < 0:
            raise RuntimeRefusal(f"queue is {queue}; give 0 or more requests that may wait")
        self.slots, self.queue = contract.dims["B"][1] if slots is None else slots, queue
        self._contract = contract
        session = Session(bundle, backend, self.slots)
        session.open_all()
        self._prompter, self._eos = session.prompter, frozenset(contract.eos_token_ids)
        self._rows = Rows(session)
        self._lengths = session.lengths
        self._prepare = Preparer(contract, session.prompter, session.processor)
        self._seats: list[_Seat | None] = [None] * self.slots
        self._changed = threading.Condition()  # of what follows, which other threads see too
        self._waiting: deque[_Seat] = deque()
        self._live = 0
        self._closing: str | None = None  # why nothing is taken any more
        self._count: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="vlmtrim-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        top_logprobs: int | None = None,
    ) -> Request:
        """Make a conversation ready, on the caller's thread: template, tokenizer, pictures.

        Text is text: control tokens that stand in it are spelled out.

        Args:
            messages: the whole conversation; the last one is the user's.
            max_new_tokens: at most so many; None for what the caches have room for.
            sampling: greedy when None.
            stop: texts that end the answer, which then holds what stands before them.
            top_logprobs: tell log-probabilities, and those of so many likeliest tokens; None for none.

        Raises:
            RuntimeRefusal: what does not fit, in one sentence.
        """
        return self._prepare(messages, max_new_tokens, sampling, stop, top_logprobs)

    def submit(self, request: Request) -> Answer:
        """Let a request wait for a slot; any thread. Raises Busy where the queue is full, Closed behind the end."""
        answer = Answer(request, self._cancel)
        saying = Saying(self._prompter, self._eos, request.max_new_tokens, request.stop)
        seat = _Seat(answer, saying, Sampler(request.sampling), time.perf_counter())
        with self._changed:
            if self._closing is not None:
                raise Closed(self._closing)
            if len(self._waiting) >= self.queue + self.slots - self._live:
                self._count["refused"] += 1
                raise Busy(f"{len(self._waiting)} requests wait already and {self._live} are answered; try again later")
            self._waiting.append(seat)
            self._changed.notify_all()
        return answer

    def state(self) -> State:
        """How it stands; any thread."""
        with self._changed:
            waiting, live, closed = len(self._waiting), self._live, self._closing is not None
            counts = {name: self._count[name] for name in _COUNTERS}
        groups = self._contract.groups
        filled = [sum(entries.tolist()) for entries in self._lengths.entries]
        used = self._contract.entry_bytes(filled) / self._contract.entry_bytes([g.capacity for g in groups])
        return State(self.slots, live, waiting, closed, **counts, cache_usage=used / self.slots)

    def close(self) -> None:
        """End all answers as cancelled, join the thread, free graphs, weights and caches. Twice is once."""
        with self._changed:
            self._closing = self._closing or "the engine is closed; open another one"
            self._changed.notify_all()
        self._thread.join()

    def _cancel(self, answer: Answer) -> None:
        """What waits is forgotten at once; what runs ends before the next step."""
        with self._changed:
            kept = [seat for seat in self._waiting if seat.answer is not answer]
            waits = len(kept) < len(self._waiting)
            if waits:
                self._waiting = deque(kept)
                self._count[CANCELLED] += 1
            self._changed.notify_all()
        if waits:
            answer.put(Token(0, NO_TOKEN, "", CANCELLED))

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._end_all(None)
        except BaseException as error:
            broke = Closed(f"the engine ended, its backend broke: {error}")
            broke.__cause__ = error
            with self._changed:
                self._closing = str(broke)
            self._end_all(broke)
        finally:
            self._rows.close()

    def _turn(self) -> bool:
        """One round of the loop; False where it is over."""
        for slot, seat in enumerate(self._seats):
            if seat is not None and seat.answer.cancelled:
                self._end(slot, CANCELLED)
        with self._changed:
            self._changed.wait_for(lambda: self._closing is not None or self._waiting or self._live)
            if self._closing is not None:
                return False
            seat = self._waiting.popleft() if self._waiting and self._live < self.slots else None
            self._live += seat is not None
        if seat is not None:
            self._prefill(seat)
        if any(self._seats):
            self._decode()
        return True

    def _prefill(self, seat: _Seat) -> None:
        """Give a request the lowest free slot. What goes wrong is this answer's alone."""
        slot, answer, request = self._seats.index(None), seat.answer, seat.answer.request
        self._seats[slot] = seat
        start = time.perf_counter()
        answer.times.queued = start - seat.since
        try:
            answer.prefill = self._rows.single[slot].prefill([request.ids], request.pictures)
        except Exception as error:
            self._end(slot, "failed", error)
            return
        seat.since = time.perf_counter()
        answer.times.prefill = seat.since - start
        with self._changed:
            self._count.update(prefills=1, prompt_tokens=len(request.ids), visual_tokens=request.visual)
        self._say(slot, seat, answer.prefill.logits)

    def _decode(self) -> None:
        """One token of every live row."""
        self._close_gaps()
        count = 1 + max(slot for slot, seat in enumerate(self._seats) if seat is not None)
        tokens, live = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)
        seats = [(slot, seat) for slot, seat in enumerate(self._seats) if seat is not None]
        for slot, seat in seats:
            tokens[slot], live[slot] = seat.token, True
        logits = self._rows.first(count).decode(tokens, live)
        with self._changed:
            self._count.update(steps=1, rows=len(seats))
        for slot, seat in seats:
            self._say(slot, seat, logits[slot : slot + 1])

    def _close_gaps(self) -> None:
        """Move the highest rows to free slots below them, unless requests wait that will take those."""
        while not self._waiting:
            highest = max(slot for slot, seat in enumerate(self._seats) if seat is not None)
            free = next(slot for slot, seat in enumerate([*self._seats, None]) if seat is None)
            if free > highest:
                return
            self._rows.move(highest, free)
            self._seats[free], self._seats[highest] = self._seats[highest], None
            with self._changed:
                self._count["moves"] += 1

    def _say(self, slot: int, seat: _Seat, logits: np.ndarray) -> None:
        """Draw a row's next token from its logits [1, V]. What goes wrong is this answer's alone."""
        answer, top = seat.answer, seat.answer.request.top_logprobs
        if answer.cancelled:
            self._end(slot, CANCELLED)
            return
        try:
            seat.token = int(seat.sampler(logits)[0])
            index = seat.saying.tokens
            text, ended = seat.saying.take(seat.token, self._rows.single[slot].room())
            told = (None, ()) if top is None else log_probabilities(logits[0], seat.token, top)
        except Exception as error:
            self._end(slot, "failed", error)
            return
        answer.times.decode = time.perf_counter() - seat.since
        token = Token(index, seat.token, text, ended, *told)
        with self._changed:
            self._count["generated_tokens"] += 1
        if ended is not None:
            self._free(slot, "finished")
        answer.put(token)

    def _end(self, slot: int, how: str, error: BaseException | None = None) -> None:
        """End the answer of a slot before it is said."""
        seat = self._seats[slot]
        assert seat is not None
        self._free(slot, how)
        if error is not None:
            seat.answer.fail(error)
        else:
            seat.answer.put(Token(seat.saying.tokens, NO_TOKEN, seat.saying.rest(), CANCELLED))

    def _free(self, slot: int, how: str) -> None:
        """The slot first, then the answer: who hears its end finds a free slot."""
        self._seats[slot] = None
        self._rows.single[slot].reset()
        with self._changed:
            self._live -= 1
            self._count[how] += 1

    def _end_all(self, error: BaseException | None) -> None:
        """End what runs and what waits."""
        for slot, seat in enumerate(self._seats):
            if seat is not None:
                self._end(slot, CANCELLED if error is None else "failed", error)
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            self._count[CANCELLED if error is None else "failed"] += len(waiting)
        for seat in waiting:
            if error is None:
                seat.answer.put(Token(0, NO_TOKEN, "", CANCELLED))
            else:
                seat.answer.fail(error)
