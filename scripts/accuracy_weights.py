"""What weights in fewer bits cost: answers of the demo task, paired with float32; and distances from its logits.

    python scripts/accuracy_weights.py --questions 1200 --output build/weights

Kept-set agreement, top-1 agreement and KL divergence are of 32 tokens behind each of ``--forced`` questions, the same
for both (those that float32 would have said). ``gptq`` is ``--calibrate`` on pictures of the training split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim import runtime
from vlmtrim.export import pipeline
from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import ask, change
from vlmtrim.export.job import Job
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.zipvl import ZipVL
from vlmtrim.runtime.measure.check import Recording, Turn, record
from vlmtrim.runtime.prompt import Conversation

METHODS: dict[str, Any] = {"dense": None, "fastv k2 r0.5": FastV(2, 0.5), "zipvl tau .9": ZipVL(0.9, 1.0)}
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"weights": "int8"},
    "w8a8": {"weights": "w8a8"},
    "int4, 32": {"weights": "int4", "block": 32},
    "int4": {"weights": "int4"},
    "int4, channel": {"weights": "int4", "block": 0},
    "int4, gptq": {"weights": "int4", "calibrate": "pictures"},
    "int4, channel, gptq": {"weights": "int4", "block": 0, "calibrate": "pictures"},
    "int4, tower int8": {"weights": "int4", "vision_weights": "int8"},
    "int4, tower int4": {"weights": "int4", "vision_weights": "int4"},
    "int4, tower w8a8": {"weights": "int4", "vision_weights": "w8a8"},
}
STEPS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/weights"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=1200, help="test questions, kinds in turn (default 1200)")
    parser.add_argument("--first", type=int, default=0, help="leave out so many of them (default 0)")
    parser.add_argument("--forced", type=int, default=48, help="questions of the distances (default 48)")
    parser.add_argument("--pictures", type=int, default=128, help="of the calibration (default 128)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="float32 comes first")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once (default 16)")
    args = parser.parse_args()
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    pictures = save_pictures(args.output / "pictures", args.pictures)
    traces: dict[str, Any] = {}
    report = []
    for method in args.methods:
        right: dict[str, np.ndarray] = {}
        forced: list[tuple[Recording, list[int]]] = []
        texts: dict[str, list[str]] = {}
        for name in dict.fromkeys(["float32", *args.weights]):
            fields = WEIGHTS[name]
            bundle = export(args, method, name, fields, pictures, traces)
            answers = ask(bundle, examples)
            right[name], texts[name] = answers.right, answers.texts
            mean, half = change(right["float32"], answers.right)
            same = np.mean([a == b for a, b in zip(texts["float32"], answers.texts, strict=True)])
            found = force(bundle, examples[: args.forced], [fed for _, fed in forced])
            forced = forced or found
            numbers = distances([r for r, _ in forced], [r for r, _ in found])
            report.append({"method": method, "weights": name, "change": mean, "half": half, "same": same, **numbers})
            told = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
            share = f"{100 * answers.right.mean():6.2f} %  {100 * mean:+.2f} +- {100 * half:.2f}"
            print(f"{method:14} {name:20} {share}  same {100 * same:.1f} %  {told}", flush=True)
    (args.output / "accuracy_weights.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


def save_pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, example in enumerate(task.examples("train", count)):
        example.image.save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(example.question.text)
    return folder


def export(
    args: argparse.Namespace, method: str, name: str, fields: dict[str, Any], pictures: Path, traces: dict[str, Any]
) -> Path:
    label = f"{method} {name}".replace(" ", "-").replace(",", "")
    given = {**fields, **({"calibrate": str(pictures)} if "calibrate" in fields else {})}
    job = Job("demo", str(args.output / "bundles" / label), METHODS[method], dtype="float32", max_seq_len=256, **given)
    return pipeline.export(dataclasses.replace(job, max_batch=args.batch, force=True), DEMO, traces)


def force(
    folder: Path, examples: Sequence[task.Example], fed: Sequence[list[int]]
) -> list[tuple[Recording, list[int]]]:
    """Recordings of questions, each with the tokens that were fed; greedy ones where ``fed`` is empty."""
    with runtime.Session(open_bundle(folder), runtime.make_backend("ort-cpu")) as session:
        found = []
        for index, example in enumerate(examples):
            ids = Conversation(session.prompter).ask(example.question.text, 1)
            expanded = session.prompter.expand_images(ids, session.processor([example.image]).tokens)
            turn = Turn("forced", expanded, (example.image,))
            found.append(record(session, turn, fed[index] if fed else STEPS))
        return found


def distances(plain: Sequence[Recording], packed: Sequence[Recording]) -> dict[str, float]:
    """Mean share of steps with the same best token, KL divergence in nats, share of kept tokens that are the same."""
    top, divergence, kept = [], [], []
    for one, other in zip(plain, packed, strict=True):
        top.append((one.logits.argmax(axis=1) == other.logits.argmax(axis=1)).mean())
        logs, others = log_softmax(one.logits), log_softmax(other.logits)
        divergence.append((np.exp(logs) * (logs - others)).sum(axis=1).mean())
        pairs = [(one.kept, other.kept)] if one.kept is not None else list(zip_layers(one, other))
        kept += [len(np.intersect1d(a, b)) / max(1, len(a)) for a, b in pairs]
    return {"top1": float(np.mean(top)), "kl": float(np.mean(divergence)), "kept": float(np.mean(kept or [1.0]))}


def zip_layers(one: Recording, other: Recording) -> Any:
    return zip(one.kept_by_layer or [], other.kept_by_layer or [], strict=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
