"""Accuracy of cache policies on the demo task, paired with the model whose caches hold everything.

    python scripts/accuracy_caches.py --questions 480 --output build/caches

Every answer of the task is one token, and the first token comes before the caches are cut; so what is asked is

    B   the same question again behind the picture, on the caches that were cut for it
    C   another question behind the picture, on the caches that were cut for the first

Each is read behind the picture: the first question's entries, which lie behind it, are taken back. Right is a first
greedy token that is the answer's. PrefixKV's shares are of pictures of the training split (no answers are read).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_zipvl import another

from vlmtrim.export import calibration, pipeline
from vlmtrim.export.checkpoint import DEMO
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import change
from vlmtrim.export.job import Job
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.caches import load_policy
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

CALIBRATED = 32  # pictures of the training split
POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("snapkv", {}),
    ("snapkv", {"window": 1}),
    ("snapkv", {"pool": 3}),
    ("aircache", {}),
    ("vl-cache", {}),
    ("csp", {}),
    ("prefixkv", {}),
    ("elastic", {}),
    ("elastic", {"merge": True}),
    ("zipvl-drop", {}),
    ("keydiff", {}),
    ("random", {}),
    ("stride", {}),
)
OF_ATTENTION = (0.99, 0.975, 0.95, 0.9)  # shares of zipvl-drop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/caches"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=480, help="test questions, kinds in turn")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    parser.add_argument("--share", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--policy", nargs="*", default=None, help="only these")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    traces: dict[str, Any] = {}
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    seconds = [another(example, index) for index, example in enumerate(examples)]
    dense, report = None, []
    for name, policy, method in subjects(args, traces):
        shares = OF_ATTENTION if name.startswith("zipvl-drop") else args.share if policy is not None else [1.0]
        for share, (same, other, held) in ask(export(args, policy, method, traces), examples, seconds, shares).items():
            dense = dense or (same, other)
            changes = [change(before, after) for before, after in zip(dense, (same, other), strict=True)]
            right = float(same.mean()), float(other.mean())
            report.append({"name": name, "share": share, "held": held, "right": right, "changes": changes})
            said = "   ".join(
                f"{100 * r:5.1f} ({100 * m:+5.1f} +- {100 * h:.1f})" for r, (m, h) in zip(right, changes, strict=True)
            )
            print(f"{name:28} {share:5.3g}  held {held:.3f}   B {said.replace('   ', '   C ', 1)}", flush=True)
            (args.output / "accuracy_caches.json").write_text(json.dumps(report, indent=1) + "\n")


def subjects(args: argparse.Namespace, traces: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, cache policy, method)."""
    yield "dense", None, None
    for name, fields in POLICIES:
        if args.policy is not None and name not in args.policy:
            continue
        policy = load_policy(name)(**fields)
        if name == "prefixkv":
            asked = [(example.image, example.question.text) for example in task.examples("train", CALIBRATED)]
            policy = policy.calibrated(calibration.scores(export(args, policy, None, traces, batch=1), asked))
        told = ", ".join(f"{field} {value}" for field, value in fields.items())
        yield f"{name}{f' ({told})' if told else ''}", policy, None
    for removed in () if args.policy is not None else (0.5, 0.75, 0.9):
        yield f"fastv k 2 r {removed:g}", None, FastV(2, removed)


def export(args: argparse.Namespace, policy: Any, method: Any, traces: dict[str, Any], batch: int = 0) -> Path:
    output = str(args.output / "bundle")
    job = Job("demo", output, method, dtype="float32", max_seq_len=256, max_batch=batch or args.batch, force=True)
    return pipeline.export(Job(**{**vars(job), "cache": policy}), DEMO, traces)


def ask(
    folder: Path, examples: list[task.Example], seconds: list[task.Question], shares: Any
) -> dict[float, tuple[np.ndarray, np.ndarray, float]]:
    """Share -> (bool [questions]: the same question again, another one; mean share of visual tokens that is held)."""
    bundle = open_bundle(folder)
    batch = bundle.contract.dims["B"][1]
    session = Session(bundle, make_backend("ort-cpu"), batch)
    found: dict[float, tuple[list[bool], list[bool], list[float]]] = {share: ([], [], []) for share in shares}
    for start in range(0, len(examples), batch):
        rows = [min(start + row, len(examples) - 1) for row in range(batch)]  # the last batch is filled up
        real = len(examples) - start
        pictures = session.processor([examples[i].image for i in rows])
        first = [prompt(session, examples[i].question, pictures.tokens[0]) for i in rows]
        other = [prompt(session, seconds[i], pictures.tokens[0]) for i in rows]
        for share in shares:
            session.reset()
            if session.caching:
                session.caching.share = share
            prefill = session.prefill(first, pictures)
            same, different, held = found[share]
            behind = [len(ids) - 1 - int(where[-1]) for ids, where in zip(first, prefill.visual_positions, strict=True)]
            for marks, prompts, asked in (
                (same, first, [examples[i].question for i in rows]),
                (different, other, [seconds[i] for i in rows]),
            ):
                take_back(session, np.array(behind))
                ids = [ids[len(ids) - back(session, ids) :] for ids in prompts]
                best = session.prefill(ids).logits.argmax(axis=1)
                behind = [len(row) for row in ids]
                said = [session.prompter.decode_stream().step(int(token)).strip() for token in best]
                marks += [word == question.answer for word, question in zip(said, asked, strict=True)][:real]
            held += [shares_held(session, prefill, row) for row in range(batch)][:real]
    return {share: (np.array(a), np.array(b), float(np.mean(c))) for share, (a, b, c) in found.items()}


def prompt(session: Session, question: task.Question, tokens: int) -> list[int]:
    ids = Conversation(session.prompter).ask(question.text, 1)
    return session.prompter.expand_images(ids, [tokens])


def back(session: Session, ids: list[int]) -> int:
    """Tokens of a prompt behind its picture."""
    return ids[::-1].index(session.contract.image_token_id)


def take_back(session: Session, tokens: np.ndarray) -> None:
    """Forget the last tokens of every row, which are text."""
    session.lengths.positions = session.lengths.positions - tokens
    session.lengths.entries = [entries - tokens for entries in session.lengths.entries]


def shares_held(session: Session, prefill: Any, row: int) -> float:
    if prefill.held is not None:
        return float(prefill.layers_that_hold(row).mean())
    groups = session.contract.groups
    return float(np.mean([1 - group.removed for group in groups for _ in group.layers]))


if __name__ == "__main__":
    main()
