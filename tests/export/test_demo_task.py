"""The demo task, judged by rules written again here from its documentation, not by its own functions."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from vlmtrim.export.demo import task
from vlmtrim.export.demo.labels import HEADS, IGNORE, WORD_HEADS, patch_labels
from vlmtrim.export.demo.scene import COLOURS, KINDS, SIZE, Scene, Shape, render

SEEDS = range(250)
# Chance, plus what 600 pictures leave to luck; kinds with two possible answers a text are at one half.
BLIND_LIMIT = dict.fromkeys(task.QUESTION_KINDS, 0.30) | {
    "exists": 0.60,
    "larger": 0.62,
    "side": 0.60,
    "background": 0.36,
}


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, task.Question]]:
    return [(task.scene_of(seed, "test"), question) for seed in SEEDS for question in task.sample(seed, "test")[1]]


def test_same_seed_same_picture_and_questions():
    for split in task.SPLITS:
        (first, first_questions), (second, second_questions) = task.sample(7, split), task.sample(7, split)
        assert first.tobytes() == second.tobytes()
        assert first_questions == second_questions


def test_pictures_are_small_rgb_and_things_keep_apart():
    for seed in SEEDS:
        scene = task.scene_of(seed, "val")
        picture = render(scene)
        assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))
        for index, one in enumerate(scene.shapes):
            assert one.radius <= min(one.x, one.y, SIZE - one.x, SIZE - one.y)
            for other in scene.shapes[:index]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_splits_share_no_picture():
    hashes = {
        split: {hashlib.sha256(task.sample(seed, split)[0].tobytes()).digest() for seed in range(200)}
        for split in task.SPLITS
    }
    assert all(len(each) == 200 for each in hashes.values())
    assert len(set.union(*hashes.values())) == 600


def test_seed_and_split_are_checked():
    with pytest.raises(ValueError, match="seed lies in"):
        task.sample(task.SEEDS_PER_SPLIT, "train")
    with pytest.raises(ValueError, match="choose one of train, val, test"):
        task.sample(0, "holdout")


def test_answers_agree_with_a_second_reading_of_the_scene(asked):
    for scene, question in asked:
        assert question.answer == _answer(scene, question.text), (scene, question)


def test_pixels_show_the_colour_of_shapes_and_background():
    shape_hits, scenes = [], [task.scene_of(seed, "test") for seed in SEEDS]
    for scene in scenes:
        pixels = np.asarray(render(scene)).astype(int)
        for shape in scene.shapes:
            if shape.kind in ("circle", "square", "star", "cross"):
                shown = pixels[int(shape.y), int(shape.x)]
                shape_hits.append(min(COLOURS, key=lambda name: abs(shown - COLOURS[name]).sum()) == shape.colour)
    assert np.mean(shape_hits) == 1.0


def test_there_are_enough_kinds_and_answers(asked):
    assert len({question.kind for _, question in asked}) == len(task.QUESTION_KINDS) >= 8
    assert {question.answer for _, question in asked} <= set(task.ANSWERS)
    assert len({question.answer for _, question in asked}) >= 20


def test_examples_take_kinds_in_turn():
    count = 2 * len(task.QUESTION_KINDS)
    kinds = [example.question.kind for example in task.examples("val", count)]
    assert kinds == [*task.QUESTION_KINDS] * 2


def test_guessing_without_the_picture_is_near_chance():
    blind = task.blind_accuracy("train", 1200)
    assert set(blind) == set(task.QUESTION_KINDS)
    assert {kind: share for kind, share in blind.items() if share > BLIND_LIMIT[kind]} == {}


def test_yes_and_no_and_counts_are_balanced(asked):
    exists = Counter(question.answer for _, question in asked if question.kind == "exists")
    assert 0.4 < exists["yes"] / exists.total() < 0.6
    counts = Counter(question.answer for _, question in asked if question.kind == "count")
    assert sorted(counts) == ["0", "1", "2", "3", "4"]
    assert max(counts.values()) < 0.3 * counts.total()


def test_patch_labels_say_what_lies_in_the_middle_of_each_circle():
    for seed in range(50):
        scene = task.scene_of(seed, "train")
        labels = dict(zip(HEADS, patch_labels(scene).reshape(len(HEADS), SIZE // 8, SIZE // 8), strict=True))
        things = len(scene.shapes) + (scene.writing is not None)
        assert (labels["centre"] == 1).sum() == things
        for shape in scene.shapes:
            if shape.kind in ("circle", "square"):
                at = int(shape.y) // 8, int(shape.x) // 8
                assert WORD_HEADS["kind"][labels["kind"][at]] == shape.kind
                assert WORD_HEADS["colour"][labels["colour"][at]] == shape.colour
                assert labels["background"][at] == IGNORE


def _answer(scene: Scene, text: str) -> str:
    """Answers a question by trying one sentence form after the other."""
    words = text.rstrip("?").replace(",", "").split()
    if text == "What colour is the background?":
        return scene.background
    if re.fullmatch(r"Which (digit|word) is written\?", text):
        assert scene.writing is not None and scene.writing.text.isdigit() == ("digit" in text)
        return scene.writing.text
    if text in ("What colour is the digit?", "What colour is the word?"):
        assert scene.writing is not None
        return scene.writing.colour
    if text.startswith("How many"):
        wanted = words[2]
        if wanted in COLOURS:
            return str(sum(1 for shape in scene.shapes if shape.colour == wanted))
        return str(sum(1 for shape in scene.shapes if wanted in (shape.kind + "s", shape.kind + "es")))
    if text.startswith("Is any"):
        return "yes" if any((shape.kind, shape.colour) == (words[2], words[3]) for shape in scene.shapes) else "no"
    if text.startswith("Which is larger"):
        (first,), (second,) = ([s for s in scene.shapes if s.kind == kind] for kind in (words[4], words[7]))
        assert abs(first.radius - second.radius) >= 2
        return first.kind if first.radius > second.radius else second.kind
    if text.startswith("What colour is the"):
        (shape,) = [shape for shape in scene.shapes if shape.kind == words[4]]
        return shape.colour
    if re.fullmatch(r"Which shape is \w+\?", text):
        (shape,) = [shape for shape in scene.shapes if shape.colour == words[3]]
        return shape.kind
    (named,) = [shape for shape in scene.shapes if f"the {shape.colour} {shape.kind}" in text]
    if text.startswith("Is the"):
        if "left or right" in text:
            return "left" if named.x < 48 else "right"
        return "top" if named.y < 48 else "bottom"
    return _beyond(scene, named, words[3])


def _beyond(scene: Scene, named: Shape, where: str) -> str:
    """The kind of the only shape in the sector, a little wider than a right angle, that opens `where` of `named`."""
    turn = {"right": 0, "below": 90, "left": 180, "above": 270}[where]
    sector = []
    for shape in scene.shapes:
        if shape is not named:
            angle = np.degrees(np.arctan2(shape.y - named.y, shape.x - named.x)) - turn
            off = abs((angle + 180) % 360 - 180)
            if off <= np.degrees(np.arctan2(1, 0.75)):
                sector.append((off, shape))
    ((off, shape),) = sector
    assert off <= np.degrees(np.arctan2(1, 1.2)) and shape.kind in KINDS
    return shape.kind
