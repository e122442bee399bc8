#!/usr/bin/env python3
"""Accuracy of selections in stages on the demo task beside one selection that keeps as many tokens on average.

    python scripts/accuracy_pyramid.py --questions 1200 --first 1200

Points of questions answered exactly, paired with the unpruned model, with half their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accuracy_zipvl as common
import numpy as np

from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.graphs import FastV
from vlmtrim.graphs.methods.pyramid import Pyramid

DEPTH, K = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/pyramid"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=1200, help="test questions, kinds in turn")
    parser.add_argument("--first", type=int, default=1200, help="number of the first of them")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    stages = {"default": None, "later": ((4, 0.5), (6, 0.25)), "FEATHER": ((2, 0.5), (4, 0.25))}
    methods: dict[str, Any] = {"dense": None}
    for name, chosen in stages.items():
        for score in ("own-row", "no-rope") if name == "FEATHER" else ("own-row", "last-row"):
            methods[f"{name}, {score}"] = Pyramid(chosen, score)
        edges = [layer for layer, _ in Pyramid(chosen).of(DEPTH)] + [DEPTH]
        shares = [1.0, *(share for _, share in Pyramid(chosen).of(DEPTH))]
        mean = sum(share * (end - start) for share, start, end in zip(shares, [0, *edges], edges, strict=False)) / DEPTH
        for score in ("last-row", "cells"):
            methods[f"fastv, {score}, mean of {name}"] = FastV(K, 1 - (mean * DEPTH - K) / (DEPTH - K), score=score)
    traces: dict[str, Any] = {}
    report, dense = [], None
    for name, method in methods.items():
        right, _, kept = common.ask(common.export(args, method, traces), examples)
        dense = right if dense is None else dense
        mean, half = change(dense, right)
        report.append({"name": name, "right": right.mean(), "change": mean, "half": half, "kept": float(np.mean(kept))})
        print(
            f"{name:34} {100 * right.mean():6.2f} %  {100 * mean:+.2f} ± {100 * half:.2f}  kept {np.mean(kept):.3f}",
            flush=True,
        )
    (args.output / "accuracy_pyramid.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
