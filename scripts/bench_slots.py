#!/usr/bin/env python3
"""Requests at once on slots beside one after the other, for bundles of the demo task, in turns and in one process.

    python scripts/bench_slots.py BUNDLE... --clients 1 2 4 8
    python scripts/bench_slots.py BUNDLE... --steps 12

Every client asks test questions one after the other, each with its picture; answers are cut at ``--tokens`` and never
end before. "alone" is a Chat that answers the same questions one at a time. Medians over the rounds; ratios are of
requests a second against alone, of the same round.

With ``--steps``, of bundles of any model: what a decode step costs by the rows that are live, behind a picture each.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmtrim import runtime
from vlmtrim.export.demo import task
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.slots.request import Preparer
from vlmtrim.runtime.slots.rows import Rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, help="exported with --max-batch of the slots wanted")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--requests", type=int, default=32, help="of all clients together, a round")
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="measure so many decode steps by live rows instead")
    args = parser.parse_args()
    if args.steps:
        by_rows(args.bundles, args.steps)
        return
    examples = list(task.examples("test", args.requests))
    runs: dict[str, Callable[[], list[list[float]]]] = {}
    for folder in args.bundles:
        # answers of one length: the model's end token ends none
        bundle = open_bundle(folder)
        bundle = replace(bundle, contract=replace(bundle.contract, eos_token_ids=()))
        chat = runtime.Chat(runtime.Session(bundle, runtime.make_backend("ort-cpu")))
        engine = runtime.Engine(bundle, runtime.make_backend("ort-cpu"), queue=64)
        runs[f"{folder.name}, alone"] = lambda chat=chat: alone(chat, examples, args.tokens)
        for clients in args.clients:
            runs[f"{folder.name}, {clients} client(s)"] = lambda engine=engine, clients=clients: together(
                engine, clients, examples, args.tokens
            )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    marks: dict[str, list[list[float]]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            found = run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                marks[name] += found
    print("| | requests/s | against alone | TTFT p50, p99 ms | between tokens p50, p99 ms |\n|---|---|---|---|---|")
    for name in runs:
        base = seconds[f"{name.rpartition(',')[0]}, alone"]
        ratio = statistics.median(b / s for b, s in zip(base, seconds[name], strict=True))
        first = [1e3 * times[0] for times in marks[name]]
        gaps = [1e3 * gap for times in marks[name] for gap in np.diff(times)]
        said = ", ".join(f"{np.percentile(first, q):.0f}" for q in (50, 99))
        between = ", ".join(f"{np.percentile(gaps, q):.1f}" for q in (50, 99))
        rate = args.requests / statistics.median(seconds[name])
        print(f"| {name} | {rate:.1f} | {ratio:.2f} | {said} | {between} |")


def by_rows(folders: list[Path], steps: int) -> None:
    """Print medians of decode steps of 1, 2, ... rows, in turns."""
    parts: dict[tuple[str, int], runtime.Session] = {}
    tokens: dict[str, int] = {}
    for folder in folders:
        bundle = open_bundle(folder)
        most = bundle.contract.dims["B"][1]
        whole = runtime.Session(bundle, runtime.make_backend("ort-cpu"), most)
        picture = runtime.Prompt(runtime.Image(generated_picture(1).resize((800, 600))), "What is it?")
        prepare = Preparer(bundle.contract, whole.prompter, whole.processor)
        request = prepare([runtime.Message("user", picture)], None, None, (), None)
        rows = Rows(whole)
        for single in rows.single:
            single.prefill([request.ids], request.pictures)
        tokens[folder.name] = len(request.ids)
        parts |= {(folder.name, count): rows.first(count) for count in range(1, most + 1)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in parts}
    for _ in range(steps + 1):
        for (name, count), part in parts.items():
            start = time.perf_counter()
            part.decode(np.full(count, 40), np.ones(count, dtype=bool))
            seconds[name, count].append(time.perf_counter() - start)
    print("| | prompt | rows | step, ms | tokens/s against one row |\n|---|---|---|---|---|")
    for (name, count), found in seconds.items():
        step, one = statistics.median(found[1:]), statistics.median(seconds[name, 1][1:])
        print(f"| {name} | {tokens[name]} | {count} | {1e3 * step:.2f} | {count * one / step:.2f} |")


def alone(chat: runtime.Chat, examples: list[task.Example], tokens: int) -> list[list[float]]:
    """Seconds from asking to each token, of every request."""
    found = []
    for example in examples:
        chat.reset()
        start = time.perf_counter()
        steps = chat.generate(example.question.text, [example.image], max_new_tokens=tokens)
        found.append([time.perf_counter() - start for _ in steps])
    return found


def together(engine: runtime.Engine, clients: int, examples: list[task.Example], tokens: int) -> list[list[float]]:
    """The same of clients that each wait for an answer before they ask again."""
    left, found = iter(examples), []
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                example = next(left, None)
            if example is None:
                return
            start = time.perf_counter()
            prompt = runtime.Prompt(runtime.Image(example.image), example.question.text)
            answer = engine.submit(engine.prepare([runtime.Message("user", prompt)], max_new_tokens=tokens))
            times = [time.perf_counter() - start for _ in answer]
            with lock:
                found.append(times)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


if __name__ == "__main__":
    main()
