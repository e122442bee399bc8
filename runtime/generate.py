"""The generation loop: a generator of steps. Printing, stopping early and timing are the caller's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.sampling import Sampler, Sampling
from vlmtrim.runtime.session import Prefill, Session
from vlmtrim.runtime.video import Picture as Still
from vlmtrim.runtime.video import Video, as_pictures, load_picture

Picture = Still | Video


@dataclass(frozen=True)
class Step:
    """One generated token per row.

    Attributes:
        index: 0 for the first token.
        token_ids: per row; None once a row has ended.
        texts: per row, what the token adds to the answer (may be empty while bytes do not form a character yet).
        ended: per row, why it ended with this step: ``eos``, ``length`` or ``capacity``; None while it goes on.
        prefill: what the prefill did; the same object on every step.
    """

    index: int
    token_ids: tuple[int | None, ...]
    texts: tuple[str, ...]
    ended: tuple[str | None, ...]
    prefill: Prefill

    @property
    def text(self) -> str:
        """Text of the first row, for sessions of one row."""
        return self.texts[0]


class Chat:
    """A conversation per row of a session, turn by turn on the same caches."""

    def __init__(self, session: Session):
        self.session = session
        self.reset()

    def reset(self) -> None:
        """Start new conversations."""
        self._running: Callable[[], Generator[Step, None, None] | None] = lambda: None
        self.session.reset()
        self._rows = [Conversation(self.session.prompter) for _ in range(self.session.batch)]
        # The last token of an answer that was cut short is said but not yet in the caches; -1 where there is none.
        self._pending = np.full(self.session.batch, -1, dtype=np.int64)

    def generate(
        self,
        prompts: str | Sequence[str],
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Iterator[Step]:
        """Ask, and yield the answer token by token.

        Args:
            prompts: one question per row; a plain string for a session of one row.
            images: the question's picture or pictures (see ``as_pictures``); for several rows, a sequence per row.
            max_new_tokens: at most so many tokens per row.
            sampling: greedy when None.

        Raises:
            RuntimeRefusal: before the first step, where prompt or pictures do not fit.
        """
        questions = [prompts] if isinstance(prompts, str) else list(prompts)
        per_row: list[Any] = [images] if isinstance(prompts, str) else list(images)
        pictures: list[list[Picture]] = [as_pictures(row) for row in per_row]
        pictures = pictures or [[] for _ in questions]
        if len(questions) != self.session.batch or len(pictures) != len(questions):
            raise RuntimeRefusal(
                f"{len(questions)} prompts and {len(pictures)} lists of images for a session of batch "
                f"{self.session.batch}"
            )
        if max_new_tokens < 1:
            raise RuntimeRefusal(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        if (running := self._running()) is not None:
            running.close()  # an answer that the caller did not hear to its end, and still holds
        prefill = self._prefill(questions, pictures)
        answer = self._answer(prefill, max_new_tokens, Sampler(sampling or Sampling()))
        self._running = weakref.ref(answer)
        return answer

    def _prefill(self, questions: list[str], pictures: list[list[Picture]]) -> Prefill:
        session = self.session
        videos = [[i for i, picture in enumerate(row) if isinstance(picture, Video)] for row in pictures]
        if any(videos) and session.contract.video_token_id is None:
            raise RuntimeRefusal(f"bundles of {session.contract.family} take no videos; give the frames as pictures")
        loaded: list[Any] = [load_picture(picture) for row in pictures for picture in row]
        processed = session.processor(loaded) if loaded else None
        counts = iter(() if processed is None else processed.tokens)
        brought = [[next(counts) for _ in row] for row in pictures]
        most = session.contract.dims["N"][1]
        if max(map(sum, brought)) > most:
            raise RuntimeRefusal(
                f"{max(map(len, brought))} images of {max(map(sum, brought))} visual tokens for one prompt; a "
                f"conversation of {session.contract.max_seq_len} tokens holds at most {most} of them"
            )
        asked: list[Conversation] = []
        try:
            fresh = []
            for row, question, brings, films in zip(self._rows, questions, pictures, videos, strict=True):
                fresh.append(row.ask(question, len(brings), films))
                asked.append(row)
            expanded = [session.prompter.expand_images(i, t) for i, t in zip(fresh, brought, strict=True)]
            self._feed_cut_short()
            return session.prefill(expanded, processed)
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

    def _answer(self, prefill: Prefill, limit: int, sample: Sampler) -> Generator[Step, None, None]:
        session, eos = self.session, set(self.session.contract.eos_token_ids)
        tokenizer = session.prompter.tokenizer
        streams = [session.prompter.decode_stream() for _ in range(session.batch)]
        said = ["" for _ in range(session.batch)]
        live = np.ones(session.batch, dtype=bool)
        logits = prefill.logits
        tokens = self._pending.copy()
        try:
            for index in range(limit):
                tokens = sample(logits)
                was_live, room = live.copy(), session.room()
                texts = [""] * session.batch
                ended: list[str | None] = [None] * session.batch
                for row in np.flatnonzero(was_live):
                    token = int(tokens[row])
                    reason = self._end_reason(token, index, limit, room, eos)
                    if token not in eos:
                        texts[row] = streams[row].step(tokenizer, token) or ""
                        said[row] += texts[row]
                    if reason is not None:
                        ended[row], live[row] = reason, False
                        self._pending[row] = -1 if reason == "eos" else token
                        self._rows[row].answer(said[row])
                ids = tuple(int(t) if was_live[row] else None for row, t in enumerate(tokens))
                yield Step(index, ids, tuple(texts), tuple(ended), prefill)
                if not live.any():
                    return
                logits = session.decode(tokens, live)
        finally:
            for row in np.flatnonzero(live):  # the caller stopped early: the last token was said, and not decoded
                self._pending[row] = tokens[row]
                self._rows[row].answer(said[row])

    @staticmethod
    def _end_reason(token: int, index: int, limit: int, room: int, eos: set[int]) -> str | None:
        if token in eos:
            return "eos"
        if index + 1 == limit:
            return "length"
        return "capacity" if room < 1 else None
