#!/usr/bin/env python3
"""Accuracy of VisionZip on the demo task beside selections before the first layer that keep as many visual tokens.

    python scripts/accuracy_visionzip.py --questions 480 --first 1200

Points of questions answered exactly, paired with the unpruned model, with half their 95 % intervals. Every question is
followed, on the same caches, by one of another kind about the same picture, which no selection has seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accuracy_zipvl as common

from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.graphs import FastV
from vlmtrim.graphs.methods.visionzip import VisionZip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/visionzip"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=480, help="test questions, kinds in turn")
    parser.add_argument("--first", type=int, default=1200, help="number of the first of them")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    parser.add_argument("--r", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    seconds = [common.another(example, index) for index, example in enumerate(examples)]
    methods: dict[str, Any] = {"dense": None}
    for r in args.r:
        methods[f"visionzip, r {r:g}"] = VisionZip(r)
        methods[f"visionzip, r {r:g}, half merged"] = VisionZip(r, 0.5)
        methods[f"visionzip, r {r:g}, none merged"] = VisionZip(r, 0.0)
        for score in ("fastervlm", "divprune"):
            methods[f"{score} at k = 0, r {r:g}"] = FastV(0, r, score=score)
    traces: dict[str, Any] = {}
    report, dense = [], None
    for name, method in methods.items():
        *right, _ = common.ask(common.export(args, method, traces), examples, seconds)
        dense = dense or right
        changes = [change(before, after) for before, after in zip(dense, right, strict=True)]
        report.append({"name": name, "right": [one.mean() for one in right], "changes": changes})
        said = "   ".join(f"{100 * mean:+.2f} ± {100 * half:.2f}" for mean, half in changes)
        print(f"{name:32} {' '.join(f'{100 * one.mean():6.2f} %' for one in right)}   {said}", flush=True)
    (args.output / "accuracy_visionzip.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
