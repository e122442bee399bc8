#!/usr/bin/env python3
"""How many image features Trimmed-Llama's heads keep together, and how often a bound would cut their union.

Exports MODEL once for every ratio without a bound, asks questions about generated pictures of many shapes, and prints,
for every ratio, the union as a share of the features (mean, least, most; features of empty tiles count as features, as
they do for the caches) and, for every bound, in how many prefills the union exceeds it and which share of all kept
features the bound would drop there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import most_features
from vlmtrim.graphs.methods.trimmed_llama import TrimmedLlama
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture

QUESTIONS = (
    "What is this?",
    "How many things are there in this picture, and which of them is the largest?",
    "Read the sign.",
    "Describe the picture in detail: what is in front, what is behind, and what the people in it are about to do.",
)
SHAPES = ((560, 560), (1120, 560), (560, 1120), (1120, 1120), (640, 480), (300, 200), (1600, 400), (200, 90))
BOUNDS = (0.25, 0.5, 0.75, 0.875, 1.0)


def export(model: str, ratio: float, dtype: str, folder: Path) -> Path:
    """A bundle whose caches take any union."""
    from vlmtrim.export import cli

    bundle = folder / f"ratio{ratio:g}"
    argv = ["--model", model, "--method", "trimmed-llama", "--ratio", str(ratio), "--bound", "1", "--dtype", dtype]
    with contextlib.redirect_stdout(sys.stderr):
        status = cli.main([*argv, "--output", str(bundle)])
    if status:
        raise SystemExit(status)
    return bundle


def unions(bundle: Path, prefills: int) -> tuple[int, np.ndarray]:
    """(features of a picture, sizes of the union in so many prefills)."""
    chat = runtime.Chat(runtime.Session(open_bundle(bundle), runtime.make_backend("ort-cpu")))
    found = []
    for index in range(prefills):
        chat.reset()
        picture = generated_picture(index).resize(SHAPES[index % len(SHAPES)])
        step = next(iter(chat.generate(QUESTIONS[index % len(QUESTIONS)], [picture], max_new_tokens=1)))
        found.append(len(step.prefill.kept_features[0]))
    return chat.session.contract.image_tokens, np.array(found)


def measure(model: str, ratios: list[float], prefills: int, dtype: str, folder: Path) -> list[dict]:
    """One record a ratio."""
    records = []
    for ratio in ratios:
        features, sizes = unions(export(model, ratio, dtype, folder), prefills)
        bounds = {}
        for bound in sorted({*(b for b in BOUNDS if b >= ratio), TrimmedLlama(ratio=ratio).most}):
            over = np.maximum(sizes - most_features(features, bound), 0)
            bounds[f"{bound:g}"] = {"bites": float((over > 0).mean()), "dropped": float(over.sum() / sizes.sum())}
        share = sizes / features
        record = {"ratio": ratio, "prefills": prefills, "features": features, "bounds": bounds}
        records.append({**record, "mean": share.mean(), "least": share.min(), "most": share.max()})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="tiny:mllama", help="as export-vlm takes it")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.25, 0.5])
    parser.add_argument("--prefills", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="one that ONNX Runtime's CPU provider runs: not bfloat16")
    parser.add_argument("--json", type=Path, help="write the records there as well")
    args = parser.parse_args()
    if args.prefills < 1:
        parser.error(f"--prefills is {args.prefills}; give 1 or more")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with tempfile.TemporaryDirectory() as folder:
        try:
            records = measure(args.model, args.ratios, args.prefills, args.dtype, Path(folder))
        except RuntimeRefusal as refusal:
            parser.exit(1, f"{parser.prog}: {refusal}\n")
    print(f"{args.model}, {records[0]['features']} features a picture, {args.prefills} prefills a ratio")
    for record in records:
        union = "  ".join(f"{name} {record[name]:6.1%}" for name in ("mean", "least", "most"))
        print(f"ratio {record['ratio']:<5g} union {union}   {record['mean'] / record['ratio']:.2f} times the ratio")
        for bound, cut in record["bounds"].items():
            print(f"    bound {bound:6} bites {cut['bites']:6.1%}   drops {cut['dropped']:6.1%} of what was kept")
    if args.json:
        args.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
