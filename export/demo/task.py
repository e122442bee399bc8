"""The demo task: questions about generated pictures, each with one exact answer of one word.

The three splits draw their pictures from disjoint ranges of seeds (`SEEDS_PER_SPLIT` each), so no picture can be in two
of them. Answers are balanced within each kind of question; `blind_accuracy` measures what guessing without the picture
earns.

Some kinds can be answered from a few patches (`colour`, `background`), some need small detail (`word`, `digit`), and
some need the whole picture (`count`, `exists`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from vlmtrim.export.demo.scene import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    KINDS,
    MAX_COUNT,
    SIZE,
    WORDS,
    Scene,
    Shape,
    Writing,
    build,
    render,
    things,
)

Thing = Shape | Writing
SPLITS = ("train", "val", "test")
SEEDS_PER_SPLIT = 2**32
PLURALS = {kind: kind + ("es" if kind.endswith("s") else "s") for kind in KINDS}
CLEARLY_LARGER = 2.0  # pixels of radius between two shapes that are compared
CLEARLY_ASIDE = 6.0  # pixels between a shape's centre and the middle of the picture when its side is asked for
STEPS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Question:
    """`kind` is one of `QUESTION_KINDS`; `answer` is one lower-case word or one digit.

    `about` are the things that one must look at, numbered as in `scene.owners`; empty where none settles the answer.
    """

    kind: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """One question about one picture; the picture is that of `sample(seed, split)`."""

    split: str
    seed: int
    image: Image.Image
    question: Question


def scene_of(seed: int, split: str) -> Scene:
    """The scene of picture number `seed` (0 <= seed < SEEDS_PER_SPLIT) of a split."""
    return build(generator(seed, split))


def sample(seed: int, split: str) -> tuple[Image.Image, list[Question]]:
    """Picture number `seed` of a split (RGB, SIZE x SIZE) and up to two questions of every kind that it allows."""
    scene = scene_of(seed, split)
    return render(scene), questions(scene, generator(seed, split, 1))


def questions(scene: Scene, rng: Generator) -> list[Question]:
    """Up to two questions of every kind that the scene allows, in the order of `QUESTION_KINDS`."""
    return [
        Question(kind, text, answer, tuple(index for index, thing in enumerate(things(scene)) if thing in about))
        for kind, ask in _ASKERS.items()
        for text, answer, about in ask(scene, rng)
    ]


def examples(split: str, count: int) -> Iterator[Example]:
    """`count` examples, one a picture, whose kinds take turns so that every kind is asked equally often."""
    seed = 0
    for index in range(count):
        kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
        while True:
            scene = scene_of(seed, split)
            asked = [question for question in questions(scene, generator(seed, split, 1)) if question.kind == kind]
            seed += 1
            if asked:
                yield Example(split, seed - 1, render(scene), asked[0])
                break


def blind_accuracy(split: str, pictures: int) -> dict[str, float]:
    """Accuracy of the best guess from the question's text alone, by kind.

    The most frequent answer to each text is learnt on the first half of the pictures and scored on the second half;
    a text not seen before gets the most frequent answer of its kind.
    """
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for seed in range(pictures):
        for question in questions(scene_of(seed, split), generator(seed, split, 1)):
            if seed < pictures // 2:
                by_text[question.text][question.answer] += 1
                by_kind[question.kind][question.answer] += 1
                continue
            seen = by_text.get(question.text) or by_kind[question.kind]
            asked[question.kind] += 1
            right[question.kind] += seen.most_common(1)[0][0] == question.answer
    return {kind: right[kind] / asked[kind] for kind in QUESTION_KINDS}


def neighbour(scene: Scene, shape: Shape, direction: str) -> Shape | None:
    """The one shape that lies plainly to the `direction` (a key of STEPS) of `shape`, or None.

    With `ahead` and `aside` the distances between centres along and across the direction: a shape lies plainly there
    when ahead >= 1.2 * aside, and none but that one may have ahead >= 0.75 * aside.
    """
    step_x, step_y = STEPS[direction]
    plain, near = [], 0
    for other in scene.shapes:
        ahead = (other.x - shape.x) * step_x + (other.y - shape.y) * step_y
        aside = abs((other.x - shape.x) * step_y) + abs((other.y - shape.y) * step_x)
        if other is shape or ahead <= 0:
            continue
        near += ahead >= 0.75 * aside
        if ahead >= 1.2 * aside:
            plain.append(other)
    return plain[0] if len(plain) == 1 and near == 1 else None


Asked = list[tuple[str, str, list[Thing]]]


def generator(seed: int, split: str, stream: int = 0) -> Generator:
    """The random stream of one picture; different `stream` numbers are independent."""
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ValueError(f"A seed lies in [0, {SEEDS_PER_SPLIT}), but {seed} was given.")
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    return np.random.default_rng((SPLITS.index(split) * SEEDS_PER_SPLIT + seed, stream))


def _alone(scene: Scene, **wanted: str) -> list[Shape]:
    """Shapes that no other shape of the scene equals in the attributes named, e.g. `colour="", kind=""`."""
    keys = [tuple(getattr(shape, name) for name in wanted) for shape in scene.shapes]
    return [shape for shape, key in zip(scene.shapes, keys, strict=True) if keys.count(key) == 1]


def _some(rng: Generator, items: list, count: int) -> list:
    return [items[index] for index in rng.permutation(len(items))[:count]]


def _colour(scene: Scene, rng: Generator) -> Asked:
    alone = _some(rng, _alone(scene, kind=""), 1)
    return [(f"What colour is the {shape.kind}?", shape.colour, [shape]) for shape in alone]


def _shape(scene: Scene, rng: Generator) -> Asked:
    alone = _some(rng, _alone(scene, colour=""), 1)
    return [(f"Which shape is {shape.colour}?", shape.kind, [shape]) for shape in alone]


def _count(scene: Scene, rng: Generator) -> Asked:
    kinds = [shape for shape in scene.shapes if shape.kind == scene.repeated_kind]
    colours = [shape for shape in scene.shapes if shape.colour == scene.repeated_colour]
    asked = [
        (f"How many {PLURALS[scene.repeated_kind]} are there?", str(len(kinds)), kinds),
        (f"How many {scene.repeated_colour} shapes are there?", str(len(colours)), colours),
    ]
    return _some(rng, asked, 2)


def _exists(scene: Scene, rng: Generator) -> Asked:
    present = sorted({(shape.colour, shape.kind) for shape in scene.shapes})
    colours, kinds = {colour for colour, _ in present}, {kind for _, kind in present}
    absent = [(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in present]
    # A pair whose colour and kind are both there, on different shapes, can only be refused by binding the two.
    crossed = [(colour, kind) for colour, kind in absent if colour in colours and kind in kinds]
    asked = []
    for _ in range(2):
        answer = bool(rng.random() < 0.5)
        pairs = present if answer else crossed if crossed and rng.random() < 0.5 else absent
        colour, kind = _some(rng, pairs, 1)[0]
        about = [shape for shape in scene.shapes if (shape.colour, shape.kind) == (colour, kind)]
        asked.append((f"Is any {kind} {colour}?", "yes" if answer else "no", about))
    return asked


def _related(scene: Scene, rng: Generator, phrases: dict[str, str]) -> Asked:
    found = []
    for shape in _alone(scene, colour="", kind=""):
        for direction, phrase in phrases.items():
            other = neighbour(scene, shape, direction)
            if other is not None:
                text = f"Which shape is {phrase} the {shape.colour} {shape.kind}?"
                found.append((text, other.kind, [shape, other]))
    return _some(rng, found, 2)


def _beside(scene: Scene, rng: Generator) -> Asked:
    return _related(scene, rng, {"left": "left of", "right": "right of"})


def _vertical(scene: Scene, rng: Generator) -> Asked:
    return _related(scene, rng, {"above": "above", "below": "below"})


def _digit(scene: Scene, rng: Generator) -> Asked:
    writing = scene.writing
    return [("Which digit is written?", writing.text, [writing])] if writing and writing.text in DIGITS else []


def _word(scene: Scene, rng: Generator) -> Asked:
    writing = scene.writing
    return [("Which word is written?", writing.text, [writing])] if writing and writing.text in WORDS else []


def _ink(scene: Scene, rng: Generator) -> Asked:
    if scene.writing is None:
        return []
    noun = "digit" if scene.writing.text in DIGITS else "word"
    return [(f"What colour is the {noun}?", scene.writing.colour, [scene.writing])]


def _larger(scene: Scene, rng: Generator) -> Asked:
    alone = _some(rng, _alone(scene, kind=""), MAX_COUNT)
    pairs = [(a, b) for a in alone for b in alone if abs(a.radius - b.radius) >= CLEARLY_LARGER]
    return [
        (f"Which is larger, the {a.kind} or the {b.kind}?", (a if a.radius > b.radius else b).kind, [a, b])
        for a, b in _some(rng, pairs, 1)
    ]


def _background(scene: Scene, rng: Generator) -> Asked:
    return [("What colour is the background?", scene.background, [])]


def _side(scene: Scene, rng: Generator) -> Asked:
    found = []
    for shape in _alone(scene, colour="", kind=""):
        for offset, low, high in ((shape.x - SIZE / 2, "left", "right"), (shape.y - SIZE / 2, "top", "bottom")):
            if abs(offset) >= CLEARLY_ASIDE:
                text = f"Is the {shape.colour} {shape.kind} at the {low} or {high}?"
                found.append((text, low if offset < 0 else high, [shape]))
    return _some(rng, found, 2)


_ASKERS: dict[str, Callable[[Scene, Generator], Asked]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "beside": _beside,
    "vertical": _vertical,
    "digit": _digit,
    "word": _word,
    "ink": _ink,
    "larger": _larger,
    "background": _background,
    "side": _side,
}
QUESTION_KINDS = tuple(_ASKERS)
ANSWERS = tuple(
    dict.fromkeys([*COLOURS, *KINDS, *BACKGROUNDS, *DIGITS, *WORDS, "yes", "no", "left", "right", "top", "bottom"])
)
