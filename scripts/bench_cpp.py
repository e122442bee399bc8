#!/usr/bin/env python3
"""The C++ runtime against the Python one on the same bundle and library, in turns in one run.

Cold start to the end of a short answer, whole processes: wall and CPU time, peak memory. Then prefill and decode of an
open session. Medians, and ratios of C++ to Python; the sizes of the binaries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "export/demo/examples/word.png"
QUESTION = ["--image", str(PICTURE), "--prompt", "Which word is written?"]


def measure(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak megabytes of a process, and the times that it prints."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    assert status == 0, command
    record = json.loads(output)
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1000,
        "prefill": 1e3 * record["times"]["prefill"],
        "token": 1e3 * record["times"]["decode"] / max(1, len(record["token_ids"]) - 1),
        "text": record["text"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=200, help="of a long answer, drawn at a high temperature")
    parser.add_argument("--build", default=str(ROOT / "build/cpp"))
    args = parser.parse_args()
    tools = {
        "C++": [f"{args.build}/vlmtrim-run"],
        "Python": [sys.executable, "-m", "vlmtrim.runtime.cli"],
    }
    long = ["--max-new-tokens", str(args.tokens), "--temperature", "30", "--seed", "5"]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for kind, more in (("short", []), ("long", long)):
        for round_ in range(args.rounds + 1):
            for name, tool in tools.items():
                one = measure([*tool, args.bundle, *QUESTION, "--json", "--backend", "ort-cpu", *more])
                if round_:
                    found.setdefault((kind, name), []).append(one)
        assert len({one["text"] for name in tools for one in found[kind, name]}) == 1, "answers differ"
    print(f"{args.bundle}, {args.rounds} rounds in turns, medians")
    rows = [("short", key) for key in ("wall", "cpu", "peak", "prefill")] + [
        ("long", key) for key in ("wall", "cpu", "token")
    ]
    units = {"wall": "s", "cpu": "s", "peak": "MB", "prefill": "ms", "token": "ms"}
    for kind, key in rows:
        ours, theirs = (statistics.median(one[key] for one in found[kind, name]) for name in tools)
        print(
            f"{kind:5} {key:8} C++ {ours:8.3f} {units[key]:2}  Python {theirs:8.3f} {units[key]:2}  {ours / theirs:.2f}"
        )
    for name in ("libvlmtrim.so", "vlmtrim-run"):
        with tempfile.NamedTemporaryFile() as target:
            subprocess.run(["strip", "-o", target.name, f"{args.build}/{name}"], check=True)
            print(f"{name}: {Path(target.name).stat().st_size / 1e6:.2f} MB stripped")


if __name__ == "__main__":
    main()
