#!/usr/bin/env python3
"""Time to the first token, decoding and memory of one random Qwen2-VL in several runtimes, on this CPU with 2 threads.

A picture of 768 visual tokens and a question, 819 tokens in all: bundles of this checkout (dense, pruned), OpenVINO
GenAI (float32, int8, int4; its CDPruner off, at 50 and at 75 %), llama.cpp's server (F16, Q8_0, Q4_0) and PyTorch.
Everybody gets a decoded picture (llama.cpp: an uncompressed PNG over loopback) and a text, another one every time, so
that no cache of prompts helps; prompts are equal token by token. The first run makes environments, conversions and
builds in --work, which takes half an hour and 20 GB; later ones find them there. A peer that cannot be had is skipped
with its reason. Rounds ask every row once, in another order each; ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import prepare
from peers.prepare import Skip, Subject

from vlmtrim.runtime.measure import machine

DENSE = "dense=--method none"
DEFAULTS = (DENSE, "fastv50=--k 2 --r 0.5", "fastv75=--k 2 --r 0.75")
QUANTIZED = (
    "{0}=--method none --weights {0} --vision-weights w8a8",
    "{0}-fastv75=--k 2 --r 0.75 --weights {0} --vision-weights w8a8",
)
PEERS = {"pytorch": prepare.pytorch, "openvino": prepare.openvino, "llama": prepare.llama}
Row = tuple[str, str, str]  # peer, weights, pruned


class Driver:
    """A peer's process. Raises Skip where it fails."""

    def __init__(self, subject: Subject, log: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [subject.python, str(prepare.HERE / subject.driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            env=environment,
            text=True,
        )
        self.rss = 0

    def request(self, **content: Any) -> dict[str, Any]:
        """One question, one answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Skip(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Skip(answer["error"])
        self.rss = answer.get("rss", self.rss)
        return answer

    def quit(self) -> None:
        """Let it end."""
        if self.process.poll() is None and self.process.stdin:
            self.process.stdin.write('{"do": "quit"}\n')
            self.process.stdin.close()
        self.process.wait()


@dataclass
class Bench:
    """What is measured so far: every row's answers in the order of the rounds; reasons of those that fell out."""

    args: argparse.Namespace
    work: Path
    subjects: list[Subject] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    samples: dict[Row, list[dict[str, Any]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    alive: dict[int, Driver] = field(default_factory=dict)

    def prepare(self, bundles: list[str]) -> None:
        """Make all that is needed."""
        model = prepare.checkpoint(self.work, self.args.layers, self.args.depth)
        for text in bundles:
            name, _, arguments = text.partition("=")
            self._try(f"ours {name}", lambda n=name, a=arguments: prepare.ours(self.work, model, n, a))
        for name in self.args.peers:
            self._try(name, lambda make=PEERS[name]: make(self.work, model))

    def _try(self, name: str, make: Any) -> None:
        try:
            self.subjects += make()
        except (Skip, OSError) as error:
            self.skipped[name] = str(error)
            print(f"{name} is skipped: {error}", file=sys.stderr, flush=True)

    def round(self, number: int) -> None:
        """Every row once."""
        shuffle = random.Random(number)
        for index in shuffle.sample(range(len(self.subjects)), len(self.subjects)):
            subject = self.subjects[index]
            if f"{subject.peer} {subject.weights}" in self.skipped:
                continue
            try:
                driver = self.alive.get(index) or self._start(index)
                for pruned in shuffle.sample(list(subject.prunings), len(subject.prunings)):
                    time.sleep(0.5)  # threads of others spin on for a while
                    asked = {"turn": number, "new_tokens": self.args.new_tokens, **subject.prunings[pruned]}
                    answer = driver.request(do="ask", **asked)
                    self.samples.setdefault((subject.peer, subject.weights, pruned), []).append(
                        answer | {"round": number}
                    )
                    print(subject.peer, subject.weights, pruned, answer, file=sys.stderr, flush=True)
            except Skip as reason:
                self.skipped[f"{subject.peer} {subject.weights}"] = str(reason)
                self._end(index)
            self._make_room(index)
            if self.args.json:  # after every peer: a run takes hours on a busy machine
                self.args.json.write_text(json.dumps(self.record(), indent=1) + "\n")

    def _start(self, index: int) -> Driver:
        subject = self.subjects[index]
        driver = self.alive[index] = Driver(subject, self.work / f"{subject.driver}.log")
        self.versions |= driver.request(do="load", **subject.load)["versions"] | subject.load.get("versions", {})
        driver.request(do="ask", turn=0, new_tokens=4, small=True)
        return driver

    def _end(self, index: int) -> None:
        if index in self.alive:
            self.alive.pop(index).quit()

    def _make_room(self, index: int) -> None:
        """Keep a peer loaded only where the largest one still fits beside all that are."""
        sizes = [driver.rss for driver in self.alive.values()]
        if sum(sizes) + max(sizes, default=0) > self.args.memory * 2**30:
            self._end(index)

    def table(self) -> str:
        """Medians; ratios to the unpruned float32 bundle, of the same rounds."""
        lines = [
            "| peer | weights | pruned | TTFT, s | of it the tower | the rest | decode, tokens/s | RSS, MB "
            "| TTFT to ours | decode to ours | rounds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        dense = {answer["round"]: answer for answer in self.samples.get(("ours", "float32", "-"), [])}
        for (peer, weights, pruned), answers in self.samples.items():
            towers = [answer["vision"] for answer in answers if "vision" in answer]
            rest = [answer["ttft"] - answer["vision"] for answer in answers if "vision" in answer]
            both = [(answer, dense[answer["round"]]) for answer in answers if answer["round"] in dense]
            cells = [
                *(peer, weights, pruned, _median([answer["ttft"] for answer in answers])),
                *(_median(towers), _median(rest), _median([answer["rate"] for answer in answers])),
                f"{max(answer['rss'] for answer in answers) / 1e6:,.0f}",
                _median([answer["ttft"] / other["ttft"] for answer, other in both], 2),
                _median([answer["rate"] / other["rate"] for answer, other in both], 2),
                str(len(answers)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {name} | skipped: {reason} |" + " |" * 9 for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """All of it, for --json."""
        rows = [{"peer": p, "weights": w, "pruned": c, "samples": s} for (p, w, c), s in self.samples.items()]
        return {
            "date": time.strftime("%Y-%m-%d"),
            "device": machine.cpu(),
            "versions": self.versions,
            "skipped": self.skipped,
            "rows": rows,
        }


def _median(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


def bundles_of(given: list[str], work: Path) -> list[str]:
    """The default bundles, quantized ones where the exporter has them, and those that were asked for."""
    export = [sys.executable, "-m", "vlmtrim.export.cli", "--help"]
    known = "--weights" in subprocess.run(export, capture_output=True, text=True).stdout
    quantized = [form.format(kind) for kind in ("int8", "int4") for form in QUANTIZED] if known else []
    return [*DEFAULTS, *quantized, *given]


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of environments, models and logs, kept (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=24, help="of the decoder")
    parser.add_argument("--depth", type=int, default=32, help="of the vision tower")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=ARGUMENTS", help="one more export-vlm bundle"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="beside our bundles")
    parser.add_argument("--memory", type=float, default=18, metavar="GIB", help="that loaded peers may take together")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    args = parser.parse_args()
    if bad := [text for text in args.ours if "=" not in text]:
        parser.error(f"--ours {bad[0]!r} is no NAME=ARGUMENTS; give for example 'mine=--k 2 --r 0.9'")
    with tempfile.TemporaryDirectory(prefix="vlmtrim-peers-") as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work)
        bench.prepare(bundles_of(args.ours, work))
        for number in range(1, args.rounds + 1):
            bench.round(number)
            print(f"\nround {number} of {args.rounds}\n{bench.table()}", file=sys.stderr, flush=True)
        for index in list(bench.alive):
            bench._end(index)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(bench.versions.items()))
    print(f"{machine.cpu()}, 2 threads; {versions}\n\n{bench.table()}")


if __name__ == "__main__":
    main()
