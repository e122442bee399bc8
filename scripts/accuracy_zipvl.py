"""Accuracy of ZipVL beside FastV on the demo task, paired with the unpruned model; and budgets for ``--budgets``.

    python scripts/accuracy_zipvl.py --questions 1200 --output build/zipvl

Every question is followed, on the same caches, by one of another kind about the same picture. Bounds, and the budgets
of the static form (tau .9), are what a tau keeps of pictures of the training split: counts alone, no answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim import runtime
from vlmtrim.export import calibration, pipeline
from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.export.job import Job
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.zipvl import ZipVL, read_budgets

CALIBRATED = 256  # pictures of the training split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/zipvl"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=1200, help="test questions, kinds in turn")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    parser.add_argument("--tau", type=float, nargs="*", default=[0.8, 0.9, 0.95, 0.975, 0.99])
    parser.add_argument("--share", type=float, nargs="*", default=[0.44, 0.33], help="static, and FastV that keeps it")
    args = parser.parse_args()
    traces: dict[str, Any] = {}
    examples = list(task.examples("test", args.questions))
    seconds = [another(example, index) for index, example in enumerate(examples)]
    pictures = list(task.examples("train", CALIBRATED))
    args.output.mkdir(parents=True, exist_ok=True)
    dense, report = None, []
    for name, method in methods(args, lambda method: calibrated(args, method, pictures, traces)):
        *right, kept = ask(export(args, method, traces), examples, seconds)
        dense = dense or right
        changes = [change(before, after) for before, after in zip(dense, right, strict=True)]
        report.append({"name": name, "right": [r.mean() for r in right], "changes": changes, "kept": kept.tolist()})
        said = "   ".join(f"{100 * mean:+.2f} +- {100 * half:.2f}" for mean, half in changes)
        shares = " ".join(f"{100 * r.mean():.2f} %" for r in right)
        print(f"{name:20} {shares}   {said}   kept {np.round(kept, 3).tolist()} mean {kept.mean():.3f}", flush=True)
        (args.output / "accuracy_zipvl.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


def methods(args: argparse.Namespace, measured: Any) -> Iterator[tuple[str, Any]]:
    """(name, method); ``measured(method)`` are the means and deviations of what its layers keep, exactly."""
    yield "dense", None
    for tau in args.tau:
        yield f"tau {tau:g}, exact", ZipVL(tau, 1.0)
        means, deviations = measured(ZipVL(tau, 1.0))
        yield f"tau {tau:g}, bounded", ZipVL(tau, tuple(np.minimum(1.0, means + deviations).tolist()))
    for target in args.share:
        means, _ = measured(ZipVL(0.9, 1.0))
        yield f"static, mean {target:g}", ZipVL(budgets=tuple((means * target / means.mean()).tolist()))
        yield f"fastv, mean {target:g}", FastV(2, 1 - (target * 8 - 2) / 6)  # two of eight layers run on all


def export(args: argparse.Namespace, method: Any, traces: dict[str, Any]) -> Path:
    label = "dense" if method is None else method.label
    output = str(args.output / "bundles" / label)
    job = Job("demo", output, method, dtype="float32", max_seq_len=256, max_batch=args.batch, force=True)
    return pipeline.export(job, DEMO, traces)


def another(example: task.Example, index: int) -> task.Question:
    """A question of another kind about the example's picture; which one goes round."""
    scene = task.scene_of(example.seed, example.split)
    others = task.questions(scene, task.generator(example.seed, example.split, 1))
    others = [question for question in others if question.kind != example.question.kind]
    return others[index % len(others)]


def ask(
    folder: Path, examples: list[task.Example], seconds: Sequence[task.Question] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bool [questions]: first answers that are exactly right, second ones where there are any, share of visual tokens
    that each layer keeps of the first)."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    chat = runtime.Chat(runtime.Session(bundle, runtime.make_backend("ort-cpu"), batch))
    right: tuple[list[bool], list[bool]] = ([], [])
    shares: list[list[float]] = []
    for start in range(0, len(examples), batch):
        rows = [min(start + row, len(examples) - 1) for row in range(batch)]  # the last batch is filled up
        real = len(examples) - start
        turns = [(right[0], [examples[i].question for i in rows], [[examples[i].image] for i in rows])]
        turns += [(right[1], [seconds[i] for i in rows], [[] for _ in rows])] if seconds else []
        chat.reset()
        for marks, questions, pictures in turns:
            said = [""] * batch
            for step in chat.generate([question.text for question in questions], pictures, max_new_tokens=8):
                said = [before + new for before, new in zip(said, step.texts, strict=True)]
                if step.index == 0 and marks is right[0]:
                    shares += [kept_shares(bundle.contract, step.prefill, row) for row in range(batch)[:real]]
            correct = [text.strip() == question.answer for text, question in zip(said, questions, strict=True)]
            marks += correct[:real]
    return np.array(right[0]), np.array(right[1]), np.mean(shares, axis=0)


def kept_shares(contract: Any, prefill: runtime.Prefill, row: int) -> list[float]:
    if prefill.kept_by_layer is not None:
        return prefill.layers_that_keep(row).mean(axis=1).tolist()
    return [1 - group.removed for group in contract.groups for _ in group.layers]


def calibrated(args: argparse.Namespace, method: ZipVL, pictures: list[task.Example], traces: Any) -> Any:
    """Means and deviations of what every layer keeps of the pictures, from a file that ``--bound`` and ``--budgets``
    read, too."""
    file = args.output / f"budgets-{method.tau:g}.json"
    if not file.exists():
        asked = [(example.image, example.question.text) for example in pictures]
        found = calibration.measure(export(args, method, traces), asked)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{file}: {found['prompts']} prompts", file=sys.stderr)
    return tuple(map(np.array, read_budgets(file)))


if __name__ == "__main__":
    main()
