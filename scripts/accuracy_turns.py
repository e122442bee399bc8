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

from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.graphs import FastV
from vlmtrim.graphs.methods.zipvl import ZipVL, read_budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/turns"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=600, help="conversations of two questions")
    parser.add_argument("--first", type=int, default=1200, help="number of the first test question")
    parser.add_argument("--batch", type=int, default=12, help="conversations that run at once")
    args = parser.parse_args()
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    seconds = [common.another(example, index) for index, example in enumerate(examples)]
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
        first, second, _ = common.ask(common.export(args, method, traces), examples, seconds)
        dense = (first, second) if dense is None else dense
        cells = [change(before, after) for before, after in zip(dense, (first, second), strict=True)]
        report.append({"name": name, "first": cells[0], "second": cells[1], "right": second.mean()})
        said = "   ".join(f"{100 * mean:+.2f} ± {100 * half:.2f}" for mean, half in cells)
        print(f"{name:26} second {100 * second.mean():6.2f} %   first, second: {said}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "accuracy_turns.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
