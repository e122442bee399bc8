"""One bundle guided by another: A Stitch in Time, SGL (arXiv 2412.03324)."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import BUNDLE, Contract
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.generate import Chat, Image, Picture, Prompt, Step
from vlmtrim.runtime.image import load_image
from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.video import Video, as_pictures, load_picture


@dataclass
class Guidance:
    """What became of a question about pictures.

    Attributes:
        confidence: geometric mean, over the tokens of the small model's answer, of the likeliest token's probability.
        exited: whether that answer was given.
        small, large: seconds that each of them took; of the large one up to now.
    """

    confidence: float
    exited: bool
    small: float
    large: float = 0.0


class Guided:
    """A small bundle that answers where it is sure, and shows a large one which visual tokens to keep where it is not.

    The small one runs first and sees all visual tokens; the attention that they receive in it ranks those of the large
    one. Every question about pictures is a conversation of its own for the small bundle; the large one goes on with
    its conversation, and answers questions without pictures alone. With ``exit_confidence`` the large one does not see
    every question, so each opens a new conversation of both.

    Args:
        small: of a bundle exported with ``--method none --emit-guide``.
        large: of one exported with ``--method guided``; both of one row.
        exit_confidence: answer with the small model's answer where its confidence reaches this; None never does.

    Raises:
        RuntimeRefusal: the bundles do not fit together.
    """

    def __init__(self, small: Chat, large: Chat, exit_confidence: float | None = None):
        if exit_confidence is not None and not 0 < exit_confidence <= 1:
            raise RuntimeRefusal(f"exit_confidence is {exit_confidence}; give a probability above 0, at most 1")
        check_pair(small.session, large.session)
        small.session.attention.on = True
        self.small, self.large, self.exit_confidence = small, large, exit_confidence
        self.guidance: Guidance | None = None  # of the last question; None where it had no picture
        self._system = ""

    def __enter__(self) -> Guided:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both."""
        self.small.close()
        self.large.close()

    @property
    def session(self) -> Session:
        """Of the bundle that gave the last answer."""
        return (self.small if self.guidance is not None and self.guidance.exited else self.large).session

    def reset(self, system: str = "") -> None:
        """Start new conversations; arguments as :meth:`Chat.reset`."""
        self._system = system
        self.small.reset(system)
        self.large.reset(system)

    def generate(
        self,
        prompt: str | Prompt,
        images: Picture | Sequence[Picture] = (),
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[Step]:
        """Ask, and yield the answer token by token; arguments as :meth:`Chat.generate`.

        The small model's part is over when this returns, and :attr:`guidance` tells of it.
        """
        question, pictures = _loaded(prompt, images)
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
        self.guidance = None
        if self.exit_confidence is not None:
            self.large.reset(self._system)
        shown = question.pictures if isinstance(question, Prompt) else pictures
        if not shown:
            return self.large.generate(question, pictures, **settings)
        self._check_same(shown)
        start = time.perf_counter()
        self.small.reset(self._system)
        steps = list(self.small.generate(question, pictures, **settings, sure=True))
        confidence = float(np.exp(np.mean([np.log(step.sure[0]) for step in steps if step.sure is not None])))
        exits = self.exit_confidence is not None and confidence >= self.exit_confidence
        self.guidance = Guidance(confidence, exits, time.perf_counter() - start)
        if exits:
            return iter(steps)
        start = time.perf_counter()
        answer = self.large.generate(question, pictures, **settings, guide=self.small.session.attention.received)
        return self._timed(answer, self.guidance, start)

    def _check_same(self, shown: Sequence[Any]) -> None:
        """Raise RuntimeRefusal unless both bundles make the same visual tokens of loaded pictures."""
        found = []
        for chat in (self.small, self.large):
            pictures = chat.session.processor(list(shown))
            found.append((list(pictures.tokens), [list(grid) for grid in pictures.grids]))
        if found[0] != found[1]:
            (small, _), (large, _) = found
            raise RuntimeRefusal(
                f"{_name(self.small.session)} makes {small} visual tokens of the pictures, {_name(self.large.session)} "
                f"{large}{' in other rows' if small == large else ''}; a guide must see the same tokens: export both "
                "with the same --image-tokens, or take another guide"
            )

    @staticmethod
    def _timed(answer: Iterator[Step], guidance: Guidance, start: float) -> Generator[Step, None, None]:
        guidance.large = time.perf_counter() - start
        for step in answer:
            guidance.large = time.perf_counter() - start
            yield step


def check_pair(small: Session, large: Session) -> None:
    """Raise RuntimeRefusal unless ``small`` can guide ``large``."""
    if not small.attention.emitted:
        raise RuntimeRefusal(
            f"{_name(small)} does not return its attention; export the guide with --method none --emit-guide"
        )
    if large.contract.guide != BUNDLE:
        raise RuntimeRefusal(f"{_name(large)} takes no scores of a guide; export it with --method guided")
    if small.batch != 1 or large.batch != 1:
        raise RuntimeRefusal(f"guide and guided run one row each, these {small.batch} and {large.batch}; open with 1")
    for what in ("image_tokens", "image_grid"):
        one, other = getattr(small.contract, what), getattr(large.contract, what)
        if one != other:
            raise RuntimeRefusal(
                f"{_name(small)} has {what} {one}, {_name(large)} {other}; a guide must see the same visual tokens: "
                "export both with the same --image-tokens, or take another guide"
            )


def _name(session: Session) -> str:
    return str(session.bundle.folder)


def _loaded(prompt: str | Prompt, images: Any) -> tuple[str | Prompt, list[Any]]:
    """A question whose pictures are read once, for two models."""
    if not isinstance(prompt, Prompt):
        return prompt, [load_picture(picture) for picture in as_pictures(images)]
    parts: list[Any] = []
    for part in prompt.parts:
        if isinstance(part, Image):
            parts.append(Image(load_image(part.source)))
        else:
            parts.append(part.load() if isinstance(part, Video) else part)
    return Prompt(*parts), as_pictures(images)


def drawn_scores(contract: Contract, rows: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Scores for a bundle that is run without its guide, to check or to time it: float32 [B, N], the same every time.

    Args:
        contract: None is returned where it takes none.
        rows: token ids, image tokens already repeated.
    """
    if contract.guide != BUNDLE:
        return None
    visual = [list(row).count(contract.image_token_id) for row in rows]
    random = np.random.default_rng(visual)
    return np.stack([random.random(count, dtype=np.float32) for count in visual])
