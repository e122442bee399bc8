"""Accuracy of ZipVL beside FastV on the demo task, paired with the unpruned model; and budgets for ``--budgets``.

    python scripts/accuracy_zipvl.py --questions 1200 --output build/zipvl

Budgets are what tau .9 keeps of pictures of the training split (counts alone, no answers), so none of them is judged.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    parser.add_argument("--tau", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.975, 0.99])
    args = parser.parse_args()
    traces: dict[str, Any] = {}
    examples = list(task.examples("test", args.questions))
    args.output.mkdir(parents=True, exist_ok=True)
    budgets = args.output / "budgets.json"
    calibrate(export(args, ZipVL(0.9, 1.0), traces), list(task.examples("train", CALIBRATED)), budgets)
    means, deviations = map(np.array, read_budgets(budgets))
    share = means.mean()
    methods: dict[str, Any] = {"dense": None}
    for tau in args.tau:
        methods[f"tau {tau:g}, exact"] = ZipVL(tau, 1.0)
    methods["tau 0.9, bounded"] = ZipVL(0.9, tuple(np.minimum(1.0, means + deviations).tolist()))
    for target in (0.44, 0.33):
        methods[f"static, mean {target:g}"] = ZipVL(budgets=tuple((means * target / share).tolist()))
        methods[f"fastv, mean {target:g}"] = FastV(2, 1 - (target * 8 - 2) / 6)  # two of eight layers run on all
    right: dict[str, np.ndarray] = {}
    report = []
    for name, method in methods.items():
        right[name], kept = ask(export(args, method, traces), examples)
        mean, half = change(right["dense"], right[name])
        report.append({"name": name, "right": right[name].mean(), "change": mean, "half": half, "kept": kept})
        line = f"{name:20} {100 * right[name].mean():6.2f} %  {100 * mean:+.2f} +- {100 * half:.2f}"
        print(line, "  kept", np.round(kept, 3).tolist(), f"mean {np.mean(kept):.3f}", flush=True)
    (args.output / "accuracy_zipvl.json").write_text(json.dumps(report, indent=1, default=list) + "\n")


def export(args: argparse.Namespace, method: Any, traces: dict[str, Any]) -> Path:
    label = "dense" if method is None else method.label
    output = str(args.output / "bundles" / label)
    job = Job("demo", output, method, dtype="float32", max_seq_len=256, max_batch=args.batch, force=True)
    return pipeline.export(job, DEMO, traces)


def ask(folder: Path, examples: list[task.Example]) -> tuple[np.ndarray, np.ndarray]:
    """(bool [questions]: answered exactly, share of visual tokens that each layer keeps)."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    chat = runtime.Chat(runtime.Session(bundle, runtime.make_backend("ort-cpu"), batch))
    right, shares = [], []
    for start in range(0, len(examples), batch):
        some = examples[start : start + batch]
        full = some + [some[-1]] * (batch - len(some))
        chat.reset()
        said = [""] * batch
        for step in chat.generate([e.question.text for e in full], [[e.image] for e in full], max_new_tokens=8):
            said = [before + new for before, new in zip(said, step.texts, strict=True)]
            if step.index == 0:
                shares += [kept_shares(bundle.contract, step.prefill, row) for row in range(len(some))]
        right += [text.strip() == e.question.answer for text, e in zip(said, some, strict=False)]
    return np.array(right), np.mean(shares, axis=0)


def kept_shares(contract: Any, prefill: runtime.Prefill, row: int) -> list[float]:
    if prefill.kept_by_layer is not None:
        return prefill.layers_that_keep(row).mean(axis=1).tolist()
    return [1 - group.removed for group in contract.groups for _ in group.layers]


def calibrate(folder: Path, examples: list[task.Example], file: Path) -> None:
    """What every layer keeps, as ``--bound FILE`` and ``--budgets FILE`` read it."""
    found = calibration.measure(folder, [(example.image, example.question.text) for example in examples])
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{file}: {found['prompts']} prompts", file=sys.stderr)


if __name__ == "__main__":
    main()
