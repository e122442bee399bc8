#!/usr/bin/env python3
"""What pruning costs a second question about the same picture, whose tokens the first one chose.

    python scripts/accuracy_turns.py --questions 600 --first 1200

The demo is asked a test question about a picture and, on the same caches, another one of another kind; the second
answer is judged, paired with the unpruned model's, in points with half their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accuracy_zipvl as common
import numpy as np

from vlmtrim import runtime
from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.zipvl import ZipVL, read_budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/turns"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=600, help="conversations of two questions")
    parser.add_argument("--first", type=int, default=1200, help="number of the first test question")
    parser.add_argument("--batch", type=int, default=12, help="conversations that run at once")
    args = parser.parse_args()
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    seconds = [another(example, index) for index, example in enumerate(examples)]
    means, deviations = map(np.array, read_budgets(DEMO / "budgets.json"))
    methods: dict[str, Any] = {
        "dense": None,
        "zipvl, tau .9, bounded": ZipVL(0.9, tuple(np.minimum(1.0, means + deviations).tolist())),
        "zipvl, static, mean .44": ZipVL(budgets=tuple((means * 0.44 / means.mean()).tolist())),
    }
    for score in ("last-row", "cells", "divprune"):
        methods |= {f"fastv, {score}, r = {r:g}": FastV(2, r, score=score) for r in (0.5, 0.75)}
    traces: dict[str, Any] = {}
    report, dense = [], None
    for name, method in methods.items():
        first, second = ask(common.export(args, method, traces), examples, seconds)
        dense = (first, second) if dense is None else dense
        cells = [change(before, after) for before, after in zip(dense, (first, second), strict=True)]
        report.append({"name": name, "first": cells[0], "second": cells[1], "right": second.mean()})
        said = "   ".join(f"{100 * mean:+.2f} ± {100 * half:.2f}" for mean, half in cells)
        print(f"{name:26} second {100 * second.mean():6.2f} %   first, second: {said}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "accuracy_turns.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


def another(example: task.Example, index: int) -> task.Question:
    """A question of another kind about the example's picture; which one goes round."""
    scene = task.scene_of(example.seed, example.split)
    others = task.questions(scene, task.generator(example.seed, example.split, 1))
    others = [question for question in others if question.kind != example.question.kind]
    return others[index % len(others)]


def ask(folder: Path, examples: list[task.Example], seconds: list[task.Question]) -> tuple[np.ndarray, np.ndarray]:
    """Whether the first and the second answers are exactly right, bool [questions] each."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    chat = runtime.Chat(runtime.Session(bundle, runtime.make_backend("ort-cpu"), batch))
    right: tuple[list[bool], list[bool]] = ([], [])
    for start in range(0, len(examples), batch):
        rows = [min(start + row, len(examples) - 1) for row in range(batch)]  # the last batch is filled up
        turns = [[examples[i].question for i in rows], [seconds[i] for i in rows]]
        images = [[[examples[i].image] for i in rows], [[] for _ in rows]]
        chat.reset()
        for marks, questions, pictures in zip(right, turns, images, strict=True):
            said = [""] * batch
            for step in chat.generate([question.text for question in questions], pictures, max_new_tokens=8):
                said = [before + new for before, new in zip(said, step.texts, strict=True)]
            correct = [text.strip() == question.answer for text, question in zip(said, questions, strict=True)]
            marks += correct[: len(examples) - start]
    return np.array(right[0]), np.array(right[1])


if __name__ == "__main__":
    main()
