#!/usr/bin/env python3
"""What weights in fewer bits change on this CPU: loading, memory, prefill and decoding of bundles, side by side.

Every round opens every bundle once, in another order each and in a process of its own, whose peak of resident memory
counts; no picture is shown, so that the decoder alone is timed. Ratios are medians of the rounds' own ratios to the
first bundle.

    scripts/bench_weights.py FLOAT INT8 INT4 --tokens 640 --steps 24 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.select_backend import choose_backend
from vlmtrim.runtime.session import Session

COLUMNS = {"load": "load, s", "prefill": "prefill, s", "decode": "tokens/s", "rss": "RSS, MB"}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=640, help="of the prompt (default 640)")
    parser.add_argument("--steps", type=int, default=24, help="of decoding (default 24)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure(args)))
        return
    found: dict[Path, list[dict[str, float]]] = {bundle: [] for bundle in args.bundles}
    for number in range(args.rounds):
        for bundle in random.Random(number).sample(args.bundles, len(args.bundles)):
            print(f"round {number + 1} of {args.rounds}: {bundle}", file=sys.stderr)
            options = [f"--{name}={getattr(args, name)}" for name in ("tokens", "steps", "threads")]
            done = subprocess.run(
                [sys.executable, __file__, str(bundle), "--once", *options],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[bundle].append(json.loads(done.stdout))
    print(f"{args.tokens} tokens of text, {args.steps} steps, {args.threads} threads; medians of {args.rounds} rounds")
    print(f"{'':28}" + "".join(f"{title:>20}" for title in COLUMNS.values()))
    first = found[args.bundles[0]]
    for bundle, rounds in found.items():
        cells = []
        for name in COLUMNS:
            ratio = statistics.median(one[name] / base[name] for one, base in zip(rounds, first, strict=True))
            cells.append(f"{statistics.median(one[name] for one in rounds):.2f} ({ratio:.2f})")
        print(f"{bundle.name:28}" + "".join(f"{cell:>20}" for cell in cells))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds until a bundle is open, of its prefill; tokens a second; megabytes at the peak."""
    start = time.perf_counter()
    bundle = open_bundle(args.bundles[0])
    session = Session(bundle, choose_backend("ort-cpu", bundle, threads=args.threads))
    found = {"load": time.perf_counter() - start}
    ids = np.random.default_rng(0).integers(300, 1000, args.tokens).tolist()
    session.prefill([ids])  # the first allocates
    session.reset()
    start = time.perf_counter()
    session.prefill([ids])
    found["prefill"] = time.perf_counter() - start
    steps = []
    for _ in range(args.steps):
        start = time.perf_counter()
        session.decode(np.array([300]))
        steps.append(time.perf_counter() - start)
    found["decode"] = 1 / statistics.median(steps)
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


if __name__ == "__main__":
    main()
