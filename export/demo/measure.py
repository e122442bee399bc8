"""Asks a bundle the demo task's questions and says how many it answers exactly, and with which uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmtrim import runtime
from vlmtrim.export.demo import task
from vlmtrim.graphs.bundle import open_bundle

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Answers:
    """What a bundle said to N examples.

    Attributes:
        texts: the greedy answers, without surrounding spaces.
        right: bool [N], whether each is exactly the expected word.
        height: mean row of the kept visual tokens, 0 top to 1 bottom; 0.5 where all are kept.
    """

    texts: list[str]
    right: np.ndarray
    height: float


def ask(bundle: Path, examples: Sequence[task.Example], backend: str = "ort-cpu") -> Answers:
    """One prompt an example, as many at once as the bundle was exported for."""
    opened = open_bundle(bundle)
    batch = opened.contract.dims["B"][1]
    chat = runtime.Chat(runtime.Session(opened, runtime.make_backend(backend), batch))
    texts: list[str] = []
    heights: list[float] = []
    for start in range(0, len(examples), batch):
        some = list(examples[start : start + batch])
        full = some + [some[-1]] * (batch - len(some))  # the last batch is filled up
        chat.reset()
        said = [""] * batch
        for step in chat.generate([e.question.text for e in full], [[e.image] for e in full], max_new_tokens=8):
            said = [before + new for before, new in zip(said, step.texts, strict=True)]
            if step.index == 0:
                heights += _heights(step.prefill, chat.session.contract.image_grid)[: len(some)]
        texts += [text.strip() for text in said[: len(some)]]
    right = np.array([text == example.question.answer for text, example in zip(texts, examples, strict=True)])
    return Answers(texts, right, float(np.mean(heights)))


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); it stays inside [0, 1] and is sound near both ends."""
    share, z2 = right / asked, Z * Z
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = Z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked * asked)) / (1 + z2 / asked)
    return middle - half, middle + half


def change(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(mean change, half its 95 % interval) of the share of right answers to the same questions, bool [N] each."""
    difference = after.astype(np.float64) - before.astype(np.float64)
    return float(difference.mean()), float(Z * difference.std() / math.sqrt(len(difference)))


def _heights(prefill: runtime.Prefill, grid: tuple[int, int] | None) -> list[float]:
    rows, columns = grid or (1, 1)
    if rows < 2:
        return [0.5] * len(prefill.visual_positions)
    tokens = (np.flatnonzero(prefill.survivors(row)) % (rows * columns) for row in range(len(prefill.visual_positions)))
    return [float((kept // columns).mean() / (rows - 1)) for kept in tokens]
