"""Accuracy of SGL on the demo task: a model guided by a smaller one, beside FastV, paired with the unpruned model.

    python scripts/accuracy_guided.py --questions 960 --output build/guided

Questions come from number 1200 of the test split on, which no selection was chosen by. Every answer is whole and
greedy; a guide's scores are the sums over its whole answer, its confidence their geometric mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim import runtime
from vlmtrim.export import pipeline
from vlmtrim.export.checkpoint import SHIPPED
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change, wilson
from vlmtrim.export.job import Job
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.guided import Guided

FIRST = 1200  # test question


@dataclass(frozen=True)
class Said:
    """What a bundle made of N questions: right bool [N], confidence [N], and of a guide scores [N, visual tokens]."""

    right: np.ndarray
    confidence: np.ndarray | None = None
    scores: np.ndarray | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/guided"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=960, help=f"test questions from number {FIRST} on")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--r", type=float, nargs="+", default=[0.75, 0.9, 0.95])
    parser.add_argument("--exit", type=float, nargs="+", default=[0.9, 0.95, 0.99], help="confidences")
    args = parser.parse_args()
    examples = list(islice(task.examples("test", FIRST + args.questions), FIRST, None))
    traces: dict[str, dict[str, Any]] = {name: {} for name in SHIPPED}

    def export(model: str, method: Any, emit_guide: bool = False) -> Path:
        output = str(args.output / "bundles" / f"{model}-{method.label if method else 'dense'}")
        limits = {"dtype": "float32", "max_seq_len": 256, "max_batch": args.batch}
        job = Job(model, output, method, **limits, emit_guide=emit_guide, force=True)
        return pipeline.export(job, SHIPPED[model], traces[model])

    dense, small = (ask(export(model, None, True), examples) for model in ("demo", "demo-small"))
    rows: list[tuple[str, np.ndarray]] = [("dense", dense.right), ("demo-small alone", small.right)]
    for r in args.r:
        folder = export("demo", Guided(args.k, r))
        by_small = ask(folder, examples, small.scores).right
        rows.append((f"guided by demo-small, r {r:g}", by_small))
        rows.append((f"guided by itself, r {r:g}", ask(folder, examples, dense.scores).right))
        rows.append((f"fastv last-row, r {r:g}", ask(export("demo", FastV(args.k, r)), examples).right))
        for sure in args.exit:
            assert small.confidence is not None
            exits = small.confidence >= sure
            rows.append((f"exit at {sure:g}, else guided, r {r:g}", np.where(exits, small.right, by_small)))
    report = [row(name, dense.right, right) for name, right in rows]
    exits = [leaving(small, sure) for sure in args.exit]
    print(table(report, exits))
    record = {"first": FIRST, "questions": args.questions, "k": args.k, "rows": report, "exits": exits}
    (args.output / "accuracy_guided.json").write_text(json.dumps(record, indent=1) + "\n")


def ask(folder: Path, examples: list[task.Example], guide: np.ndarray | None = None) -> Said:
    """Whole greedy answers; ``guide`` are the scores [N, visual tokens] for a guided bundle."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    chat = runtime.Chat(runtime.Session(bundle, runtime.make_backend("ort-cpu"), batch))
    attention = chat.session.attention
    attention.on = attention.emitted
    right, confidence, scores = [], [], []
    for some, full in batches(examples, batch):
        chat.reset()
        start = len(right)
        given = None if guide is None else np.resize(guide[start : start + batch], (batch, guide.shape[1]))
        said, sure = [""] * batch, [[] for _ in range(batch)]
        questions, images = [e.question.text for e in full], [[e.image] for e in full]
        for step in chat.generate(questions, images, max_new_tokens=8, guide=given, sure=True):
            said = [before + new for before, new in zip(said, step.texts, strict=True)]
            for row_, token in enumerate(step.token_ids):
                if token is not None and step.sure is not None:
                    sure[row_].append(step.sure[row_])
        right += [text.strip() == e.question.answer for text, e in zip(said, some, strict=False)]
        confidence += [float(np.exp(np.mean(np.log(values)))) for values in sure[: len(some)]]
        scores += list(attention.received[: len(some)]) if attention.emitted else []
    return Said(np.array(right), np.array(confidence), np.array(scores) if scores else None)


def batches(examples: list[task.Example], size: int) -> Iterator[tuple[list[task.Example], list[task.Example]]]:
    """(some, the same filled up to ``size``)."""
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        yield some, some + [some[-1]] * (size - len(some))


def row(name: str, dense: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """A line of the report; changes are paired with the unpruned model."""
    mean, half = change(dense, right)
    return {"name": name, "right": float(right.mean()), "change": mean, "half": half}


def leaving(small: Said, sure: float) -> dict[str, Any]:
    """How many questions the guide answers itself, and how many of those rightly."""
    assert small.confidence is not None
    exits = small.confidence >= sure
    count, right = int(exits.sum()), int(small.right[exits].sum())
    low, high = wilson(right, count) if count else (0.0, 1.0)
    return {"confidence": sure, "share": float(exits.mean()), "exits": count, "right": right, "interval": [low, high]}


def table(report: list[dict[str, Any]], exits: list[dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    lines = ["| | right | change |", "|---|---|---|"]
    for each in report:
        said = f"{100 * each['change']:+.2f} +- {100 * each['half']:.2f}"
        lines.append(f"| {each['name']} | {100 * each['right']:.2f} % | {said} |")
    lines += ["", "| confidence | exits | right of them |", "|---|---|---|"]
    for each in exits:
        low, high = each["interval"]
        lines.append(
            f"| {each['confidence']:g} | {100 * each['share']:.1f} % | {each['right']} of {each['exits']} "
            f"({100 * low:.1f} to {100 * high:.1f} %) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
