"""The generation loop: a generator of steps. Printing, stopping early and timing are the caller's."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.fitting import check_pictures
from vlmtrim.runtime.image import Picture as Still
from vlmtrim.runtime.processors.base import Pictures, Processor
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.results import Prefill
from vlmtrim.runtime.sampling import Sampler, Sampling, largest_probability
from vlmtrim.runtime.saying import Saying
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.video import Video, as_pictures, load_picture

Picture = Still | Video


@dataclass(frozen=True)
class Image:
    """A picture in its place among the parts of a :class:`Prompt`."""

    source: Still


class Prompt:
    """A question with pictures between its words: ``Prompt("Is ", Image("a.png"), " larger than ", Image("b.png"))``.

    The model sees them in this order, whatever the chat template does with pictures. Spaces beside them are yours.

    Args:
        parts: texts, :class:`Image` and :class:`Video`, in order.
    """

    def __init__(self, *parts: str | Image | Video):
        for part in parts:
            if not isinstance(part, str | Image | Video):
                raise RuntimeRefusal(
                    f"a part of a prompt is of type {type(part).__name__}; give texts, Image(...) and Video(...)"
                )
        self.parts = parts

    @property
    def pictures(self) -> list[Picture]:
        """Its pictures and videos, in order."""
        return [part.source if isinstance(part, Image) else part for part in self.parts if not isinstance(part, str)]

    def content(self) -> list[dict[str, Any]]:
        """Its parts as chat templates take them."""
        kinds = {str: "text", Image: "image", Video: "video"}
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": kinds[type(part)]}
            for part in self.parts
        ]


@dataclass(frozen=True)
class Step:
    """One generated token per row.

    Attributes:
        index: 0 for the first token.
        token_ids: per row; None once a row has ended.
        texts: per row, what the token adds to the answer (may be empty while bytes do not form a character yet, or
            while what was said may become a stop text).
        ended: per row, why it ended with this step: ``eos``, ``stop``, ``length`` or ``capacity``; None while it goes
            on.
        prefill: what the prefill did; the same object on every step.
        sure: per row, the largest probability (at temperature 1) where the token was chosen; None unless asked for.
    """

    index: int
    token_ids: tuple[int | None, ...]
    texts: tuple[str, ...]
    ended: tuple[str | None, ...]
    prefill: Prefill
    sure: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first row, for sessions of one row."""
        return self.texts[0]


class Chat:
    """A conversation per row of a session, turn by turn on the same caches; ``with`` closes it.

    One thread at a time: while an answer is being generated, another thread that asks or resets is refused. An answer
    that the same thread does not hear to its end is ended by its next question.
    """

    def __init__(self, session: Session, system: str = ""):
        self.session = session
        self._lock = threading.Lock()
        self._running: Callable[[], Any] = lambda: None
        self._asker = threading.get_ident()
        self.reset(system)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the answer and free graphs, weights and caches. What is asked afterwards is refused."""
        with self._alone():
            self._end_answer()
            self.session.close()

    def reset(self, system: str = "") -> None:
        """Start new conversations; ends the answer that is being generated.

        Args:
            system: what stands before the first question, for templates that have a place for it.
        """
        with self._alone():
            self._end_answer()
            self.session.reset()
            self._rows = [Conversation(self.session.prompter, system) for _ in range(self.session.batch)]
            # The last token of an answer that was cut short is said but not yet in the caches; -1 where there is none.
            self._pending = np.full(self.session.batch, -1, dtype=np.int64)

    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        guide: np.ndarray | None = None,
        sure: bool = False,
    ) -> Iterator[Step]:
        """Ask, and yield the answer token by token.

        Text is text: control tokens that stand in it are spelled out.

        Args:
            prompts: one question per row; a plain string or :class:`Prompt` for a session of one row.
            images: the question's pictures, which the template puts before its words: files, Pillow images, videos;
                one alone or a sequence; for several rows, a sequence per row. A :class:`Prompt` has its own.
            max_new_tokens: at most so many tokens per row.
            sampling: greedy when None.
            stop: texts that end an answer, which then holds what stands before them.
            guide: what the visual tokens are ranked by, float32 [rows, N], where another bundle provides that
                (:class:`vlmtrim.runtime.Guided`).
            sure: say with every step how probable the likeliest token was.

        Raises:
            RuntimeRefusal: before the first step, where prompt or pictures do not fit.
        """
        alone = isinstance(prompts, str | Prompt)
        questions: list[str | Prompt] = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        pictures = self._pictures(questions, images, alone)
        if max_new_tokens < 1:
            raise RuntimeRefusal(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        with self._alone():
            self._end_answer()
            eos = set(self.session.contract.eos_token_ids)
            sayings = [Saying(self.session.prompter, eos, max_new_tokens, stops) for _ in questions]
            prefill = self._prefill(questions, pictures, guide)
            answer = self._answer(prefill, Sampler(sampling or Sampling()), sayings, sure)
            self._running, self._asker = weakref.ref(answer), threading.get_ident()
        return answer

    def _alone(self) -> _Alone:
        return _Alone(self._lock)

    def _end_answer(self) -> None:
        """Close an answer that the caller did not hear to its end, and still holds."""
        running = self._running()
        if running is None or running.gi_frame is None:
            return
        if self._asker != threading.get_ident() or running.gi_running:
            raise RuntimeRefusal(
                "another thread's answer is being generated in this session; wait for its end, or open a session for "
                "each thread"
            )
        running.close()

    def _pictures(self, questions: list[str | Prompt], images: Any, alone: bool) -> list[list[Picture]]:
        """Of every row."""
        rows = [as_pictures(images)] if alone else [as_pictures(row) for row in images]
        rows = rows or [[] for _ in questions]
        if len(questions) != self.session.batch or len(rows) != len(questions):
            raise RuntimeRefusal(
                f"{len(questions)} prompts and {len(rows)} lists of images for a session of batch {self.session.batch}"
            )
        for index, question in enumerate(questions):
            if isinstance(question, Prompt):
                if rows[index]:
                    raise RuntimeRefusal("a Prompt has its pictures among its parts; leave images out")
                rows[index] = question.pictures
            elif not isinstance(question, str):
                raise RuntimeRefusal(f"a prompt is of type {type(question).__name__}; give a text or a Prompt")
            words = question.parts if isinstance(question, Prompt) else (question,)
            if not rows[index] and not any(isinstance(word, str) and word.strip() for word in words):
                raise RuntimeRefusal("the prompt is empty; ask something, or give a picture")
        return rows

    def _prefill(
        self, questions: list[str | Prompt], pictures: list[list[Picture]], guide: np.ndarray | None
    ) -> Prefill:
        session = self.session
        videos = [[i for i, picture in enumerate(row) if isinstance(picture, Video)] for row in pictures]
        processed = process(session.processor, *pictures)
        ends = [0, *itertools.accumulate(map(len, pictures))]
        rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        brought = [() if processed is None else processed.tokens[row] for row in rows]
        told = [() if processed is None else processed.words[row] for row in rows]
        check_pictures(session.contract, brought)
        asked: list[Conversation] = []
        try:
            expanded = []
            for row, question, films, tokens, words in zip(self._rows, questions, videos, brought, told, strict=True):
                asks = question.content() if isinstance(question, Prompt) else question
                fresh = row.ask(asks, len(tokens), films, words)
                asked.append(row)
                expanded.append(session.prompter.expand_images(fresh, tokens, words))
            self._feed_cut_short()
            return session.prefill(expanded, processed, guide)
        except BaseException:
            for row in asked:
                row.take_back()
            raise

    def _feed_cut_short(self) -> None:
        """Bring the last tokens of answers that were cut short into the caches."""
        session = self.session
        cut_short = self._pending >= 0
        if cut_short.any() and session.room() > 0:
            # Fed on its own: were it the image token, the prefill would take it for a visual token.
            session.decode(np.maximum(self._pending, 0), cut_short)
        self._pending[:] = -1

    def _answer(
        self, prefill: Prefill, sample: Sampler, sayings: Sequence[Saying], sure: bool
    ) -> Generator[Step, None, None]:
        session = self.session
        live = np.ones(session.batch, dtype=bool)
        logits = prefill.logits
        tokens = self._pending.copy()
        try:
            for index in itertools.count():
                tokens = sample(logits)
                probable = tuple(largest_probability(logits).tolist()) if sure else None
                was_live, room = live.copy(), session.room()
                texts = [""] * session.batch
                ended: list[str | None] = [None] * session.batch
                for row in np.flatnonzero(was_live).tolist():
                    texts[row], reason = sayings[row].take(int(tokens[row]), room)
                    if reason is not None:
                        ended[row], live[row] = reason, False
                        self._pending[row] = -1 if reason == "eos" else tokens[row]
                        self._rows[row].answer(sayings[row].said)
                ids = tuple(int(t) if was_live[row] else None for row, t in enumerate(tokens))
                yield Step(index, ids, tuple(texts), tuple(ended), prefill, probable)
                if not live.any():
                    return
                logits = session.decode(tokens, live)
        finally:
            # Where the caller stopped early, the last token was said, and not decoded.
            for row in np.flatnonzero(live).tolist():
                self._pending[row] = tokens[row]
                self._rows[row].answer(sayings[row].said)


def process(processor: Processor, *rows: Sequence[Picture]) -> Pictures | None:
    """What pictures and videos become, or None for none. Raises RuntimeRefusal where one cannot be read or taken."""
    given = [picture for row in rows for picture in row]
    if not processor.takes_videos and any(isinstance(picture, Video) for picture in given):
        raise RuntimeRefusal(f"bundles of {processor.contract.family} take no videos; give the frames as pictures")
    loaded: list[list[Any]] = [[load_picture(picture) for picture in row] for row in rows]
    return processor.of_rows(loaded) if given else None


class _Alone:
    """A lock that is not waited for."""

    def __init__(self, lock: threading.Lock):
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeRefusal("another thread is using this session; wait for it, or open a session for each thread")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
