#!/usr/bin/env python3
"""What attending to few cache entries while decoding costs the demo model.

    python scripts/accuracy_tidal.py --questions 600

The demo answers in one token, which a dense prefill has decided. So only the picture is prefilled here, and the
question is fed token by token, as decode steps that attend to the entries chosen: the answer is judged, paired with the
unpruned model's, in points with half their 95 % intervals; and the prediction behind every fed token is held against
that model's (Kullback-Leibler divergence in nats, and how often the likeliest token is the same).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accuracy_zipvl as common
import numpy as np

from vlmtrim import runtime
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.prompt import Conversation

Tidal = load_method("tidal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/tidal"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--first", type=int, default=1200, help="number of the first test question")
    parser.add_argument("--batch", type=int, default=12, help="questions that run at once")
    parser.add_argument("--entries", type=int, nargs="+", default=[96, 64, 32, 16, 8, 4])
    args = parser.parse_args()
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    methods: dict[str, Any] = {"dense": None}
    for entries in args.entries:
        for selecting in (None, (2,), (2, 5)):
            methods[f"{entries} entries, layers {selecting or '2,3'}"] = Tidal(entries, selecting)
    traces: dict[str, Any] = {}
    report, dense = [], None
    for name, method in methods.items():
        right, logits = ask(common.export(args, method, traces), examples)
        dense = dense or (right, logits)
        mean, half = change(dense[0], right)
        apart, same = divergence(dense[1], logits), float((dense[1].argmax(1) == logits.argmax(1)).mean())
        report.append({"name": name, "right": right.mean(), "change": (mean, half), "kl": apart, "same": same})
        print(
            f"{name:28} {100 * right.mean():6.2f} %  {100 * mean:+.2f} ± {100 * half:.2f}  KL {apart:.2e}  "
            f"same token {100 * same:.2f} %",
            flush=True,
        )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "accuracy_tidal.json").write_text(json.dumps(report, indent=1, default=float) + "\n")


def ask(folder: Path, examples: list[task.Example]) -> tuple[np.ndarray, np.ndarray]:
    """(whether the answers are right, bool [questions]; logits [steps, V] behind every token of the questions)."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    session = runtime.Session(bundle, runtime.make_backend("ort-cpu"), batch)
    right, behind = [], []
    for start in range(0, len(examples), batch):
        rows = [examples[min(start + row, len(examples) - 1)] for row in range(batch)]  # the last batch is filled up
        session.reset()
        pictures = session.processor([row.image for row in rows])
        prompts = [prompt(session, row.question.text, pictures.tokens[:1]) for row in rows]
        ends = [max(np.flatnonzero(np.array(ids) == bundle.contract.image_token_id)) + 1 for ids in prompts]
        session.prefill([ids[:end] for ids, end in zip(prompts, ends, strict=True)], pictures)
        questions = [ids[end:] for ids, end in zip(prompts, ends, strict=True)]
        last = np.zeros((batch, 0))
        for tokens, live in steps(questions):
            logits = session.decode(tokens, live)
            last = np.where(live[:, None], logits, last if last.size else logits)
            behind.append(logits[live & (np.arange(batch) < len(examples) - start)])
        said = [session.prompter.decode_stream().step(int(row.argmax())).strip() for row in last]
        right += [text == row.question.answer for text, row in zip(said, rows, strict=True)][: len(examples) - start]
    return np.array(right), np.concatenate(behind)


def prompt(session: runtime.Session, question: str, image_tokens: Any) -> list[int]:
    """Token ids of a question about a picture."""
    return session.prompter.expand_images(Conversation(session.prompter).ask(question, 1), image_tokens)


def steps(questions: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(the next token of every row int64 [B], which rows have one bool [B])."""
    for index in range(max(map(len, questions))):
        live = np.array([index < len(ids) for ids in questions])
        yield np.array([ids[min(index, len(ids) - 1)] for ids in questions]), live


def divergence(dense: np.ndarray, found: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of predictions from the dense ones, of logits [steps, V], in nats."""
    one, other = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (dense, found))
    return float((np.exp(one) * (one - other)).sum(axis=1).mean())


if __name__ == "__main__":
    main()
