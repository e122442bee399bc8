"""What every patch of a demo picture shows, for training the vision tower patch by patch.

A head is one question asked of every patch; IGNORE marks the patches that it does not concern. Heads whose classes are
words (`WORD_HEADS`) are scored against the words' own embeddings; the others (`PLAIN_HEADS`) have their own matrix.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.export.demo.scene import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    KINDS,
    PATCH,
    SIZE,
    WORDS,
    Scene,
    letter_at,
    owners,
    things,
)
from vlmtrim.export.demo.task import STEPS, neighbour

IGNORE = -100
WORD_HEADS: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "text": DIGITS + WORDS,
    "background": tuple(BACKGROUNDS),
}
PLAIN_HEADS = {"thing": 3, "centre": 2, "large": 2, "is_left": 2, "is_top": 2} | {step: len(KINDS) for step in STEPS}
LETTERS = sorted(set("".join(DIGITS + WORDS)))
PLAIN_HEADS["letter"] = len(LETTERS)
HEADS = (*WORD_HEADS, *PLAIN_HEADS)
PATCHES = (SIZE // PATCH) ** 2


def patch_labels(scene: Scene) -> np.ndarray:
    """int64 [len(HEADS), PATCHES], patches in reading order."""
    owner = owners(scene).reshape(-1)
    known = [_of_shape(scene, index) for index in range(len(scene.shapes))]
    if scene.writing is not None:
        known.append(_of_writing(scene))
    nothing = {"background": WORD_HEADS["background"].index(scene.background), "thing": 0, "centre": 0}
    # Row -1 serves the patches that no thing owns.
    table = np.array([[thing.get(head, IGNORE) for head in HEADS] for thing in (*known, nothing)], np.int64)
    labels = table[owner].T.copy()
    if scene.writing is not None:
        for patch in np.flatnonzero(owner == len(scene.shapes)):
            letter = letter_at(scene.writing, (patch % (SIZE // PATCH) + 0.5) * PATCH)
            labels[HEADS.index("letter"), patch] = LETTERS.index(letter)
    for thing in things(scene):
        labels[HEADS.index("centre"), int(thing.y) // PATCH * (SIZE // PATCH) + int(thing.x) // PATCH] = 1
    return labels


def _of_shape(scene: Scene, index: int) -> dict[str, int]:
    shape = scene.shapes[index]
    labels = {
        "kind": KINDS.index(shape.kind),
        "colour": WORD_HEADS["colour"].index(shape.colour),
        "thing": 1,
        "centre": 0,
        "large": int(shape.radius > 10),
        "is_left": int(shape.x < SIZE / 2),
        "is_top": int(shape.y < SIZE / 2),
    }
    for direction in STEPS:
        other = neighbour(scene, shape, direction)
        if other is not None:
            labels[direction] = KINDS.index(other.kind)
    return labels


def _of_writing(scene: Scene) -> dict[str, int]:
    writing = scene.writing
    assert writing is not None
    return {
        "text": WORD_HEADS["text"].index(writing.text),
        "colour": WORD_HEADS["colour"].index(writing.colour),
        "thing": 2,
        "centre": 0,
    }
