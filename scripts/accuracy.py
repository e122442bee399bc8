#!/usr/bin/env python3
"""What pruning costs the demo model: exact answers to held-out questions, by k, r, score and kind of question.

Exports one bundle for every setting that there is (a score that reads attention needs k >= 1), asks each the same test
questions (one picture and one prompt a question), and writes accuracy.json (every figure, and the bundles' checksums),
accuracy.md (the tables) and plots. Intervals are
95 %: Wilson's for shares, of the paired difference where a setting is compared with the unpruned model.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vlmtrim.export import checkpoint, pipeline
from vlmtrim.export.demo import task
from vlmtrim.export.demo.measure import ask, change, wilson
from vlmtrim.export.flops import prefill_macs
from vlmtrim.export.job import Job
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.checksums import sha256
from vlmtrim.graphs.methods import make_method
from vlmtrim.graphs.rules import ATTENTION, load_rule, rule_names

FIRST = 360  # questions whose answers are told one by one, for the tests
LENGTH = 256  # tokens of a conversation; a question with its picture takes about 160
TYPICAL_TEXT = 14  # prompt tokens besides the picture's
KEPT = {"flops_kept": "share of the prefill's FLOPs kept", "cache_kept": "share of the cache kept"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a checkpoint of the demo task")
    parser.add_argument("--output", type=Path, default=Path("build/accuracy"), help="folder for report and bundles")
    parser.add_argument("--questions", type=int, default=1200, help="test questions, kinds in turn")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--r", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--score", nargs="+", default=rule_names(), choices=rule_names())
    parser.add_argument("--seeds", type=int, default=2, help="draws of the random score, averaged")
    parser.add_argument("--batch", type=int, default=16, help="questions that run at once")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    report = measure(args)
    (args.output / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n\n".join([summary(report), *(by_kind(report, score) for score in scores_of(report))])
    (args.output / "accuracy.md").write_text(text + "\n")
    print(text)
    plot(report, args.output)


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fields of the jobs: the unpruned model, r = 0 once a k (nothing is removed, whatever the score), all others."""
    yield {"method": "none"}
    for k in args.k:
        for r in args.r:
            able = [name for name in args.score if k or ATTENTION not in load_rule(name).NEEDS]
            for score in able if r else ["last-row"]:
                for seed in range(args.seeds if score == "random" else 1):
                    yield {"method": "fastv", "k": k, "r": r, "score": score, "seed": seed}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    examples = list(task.examples("test", args.first + args.questions))[args.first :]
    kinds = np.array([example.question.kind for example in examples])
    runs: list[dict[str, Any]] = []
    right: list[np.ndarray] = []
    traces: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint.resolve(args.model, Path(scratch), weights=True)
        _, config = checkpoint.read_config(source)
        weights = sha256(source / "model.safetensors")
        for fields in settings(args):
            label = (
                "dense" if fields["method"] == "none" else "-".join(str(fields[n]) for n in ("k", "r", "score", "seed"))
            )
            job = Job(
                model=args.model,
                output=str(args.output / "bundles" / label),
                dtype="float32",
                max_seq_len=LENGTH,
                max_batch=args.batch,
                force=True,
                method=make_method(fields["method"], **{name: fields[name] for name in fields if name != "method"}),
            )
            bundle = open_bundle(pipeline.export(job, source, traces))
            answers = ask(bundle.folder, examples)
            right.append(answers.right)
            visual = bundle.contract.image_tokens
            macs = [
                prefill_macs(config.text_config, visual + TYPICAL_TEXT, visual, k, r)
                for k, r in ((fields.get("k", 0), fields.get("r", 0)), (0, 0))
            ]
            runs.append(
                {
                    **fields,
                    "bundle": bundle.digest,
                    "decoder": bundle.sums["decoder.onnx"],
                    "flops_kept": round(macs[0] / macs[1], 4),
                    "cache_kept": round(cache_kept(bundle.contract), 4),
                    "height": round(answers.height, 4),
                    "first": "".join("01"[int(mark)] for mark in answers.right[:FIRST]),
                    **figures(answers.right, right[0], kinds),
                }
            )
            print(f"{label}: {runs[-1]['all']['share']:.3f}", file=sys.stderr, flush=True)
    return {
        "date": date.today().isoformat(),
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "model": args.model,
        "weights": weights,
        "questions": len(examples),
        "first": args.first,
        "runs": runs,
    }


def cache_kept(contract: Any) -> float:
    """Cache entries that a question of typical length fills, as a share of the unpruned model's."""
    visual, tokens = contract.image_tokens, contract.image_tokens + TYPICAL_TEXT
    filled = sum(len(group.layers) * group.length(tokens, visual) for group in contract.groups)
    return filled / (tokens * sum(len(group.layers) for group in contract.groups))


def figures(right: np.ndarray, dense: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """Share, interval and change against the unpruned model, over all questions and by kind."""
    result = {}
    for name in ("all", *task.QUESTION_KINDS):
        mine = np.ones(len(kinds), bool) if name == "all" else kinds == name
        low, high = wilson(int(right[mine].sum()), int(mine.sum()))
        difference, half = change(dense[mine], right[mine])
        values = {"share": right[mine].mean(), "low": low, "high": high, "change": difference, "change_half": half}
        result[name] = {key: round(float(value), 4) for key, value in values.items()}
    return result


def averaged(report: dict[str, Any]) -> dict[tuple[int, float, str], dict[str, Any]]:
    """(k, r, score) -> figures, the mean over seeds; r = 0 stands for every score."""
    groups: dict[tuple[int, float, str], list[dict[str, Any]]] = {}
    for run in report["runs"][1:]:
        scores = [run["score"]] if run["r"] else rule_names()
        for score in scores:
            groups.setdefault((run["k"], run["r"], score), []).append(run)
    result = {}
    for key, runs in groups.items():
        first = runs[0]
        mean = {
            name: {field: float(np.mean([run[name][field] for run in runs])) for field in first[name]}
            for name in ("all", *task.QUESTION_KINDS)
        }
        kept = {name: first[name] for name in ("flops_kept", "cache_kept")}
        result[key] = {**kept, "height": np.mean([run["height"] for run in runs]), **mean}
    return result


def scores_of(report: dict[str, Any]) -> list[str]:
    used = {run["score"] for run in report["runs"][1:] if run["r"]}
    return [score for score in rule_names() if score in used]


def summary(report: dict[str, Any]) -> str:
    """Change in points against the unpruned model, one line a (k, r)."""
    dense, groups, scores = report["runs"][0]["all"], averaged(report), scores_of(report)
    lines = [
        f"{report['questions']} test questions from number {report['first']} on, "
        f"unpruned {100 * dense['share']:.1f} % right "
        f"({100 * dense['low']:.1f} to {100 * dense['high']:.1f}); weights {report['weights'][:12]}. Change in points, "
        "with half its 95 % interval; height: mean row of the kept tokens, 0 top to 1 bottom, last-row / no-rope.",
        "",
        f"| k | r | FLOPs kept | cache kept | {' | '.join(scores)} | height |",
        f"|---|---|---|---|{'---|' * len(scores)}---|",
    ]
    for k, r in sorted({key[:2] for key in groups}):
        cells = []
        for score in scores:
            values = groups[k, r, score]["all"] if (k, r, score) in groups else None
            cells.append(f"{100 * values['change']:+.1f} ± {100 * values['change_half']:.1f}" if values else "-")
        heights = [f"{groups[k, r, s]['height']:.2f}" for s in ("last-row", "no-rope") if (k, r, s) in groups]
        any_score = next(values for key, values in groups.items() if key[:2] == (k, r))
        kept = [f"{100 * any_score[name]:.0f} %" for name in ("flops_kept", "cache_kept")]
        lines.append(f"| {k} | {r:g} | {' | '.join(kept)} | {' | '.join(cells)} | {' / '.join(heights) or '-'} |")
    return "\n".join(lines)


def by_kind(report: dict[str, Any], score: str) -> str:
    """Share of right answers by kind of question under one score."""
    dense, groups = report["runs"][0], averaged(report)
    keys = [key for key in sorted(groups) if key[1] and key[2] == score]
    lines = [
        f"Right answers in % by kind, score {score}:",
        "",
        "| kind | unpruned | " + " | ".join(f"k={k} r={r:g}" for k, r, _ in keys) + " |",
        "|---|---|" + "---|" * len(keys),
    ]
    for kind in task.QUESTION_KINDS:
        cells = [f"{100 * groups[key][kind]['share']:.0f}" for key in keys]
        shares = dense[kind]
        whole = f"{100 * shares['share']:.1f} ({100 * shares['low']:.1f}-{100 * shares['high']:.1f})"
        lines.append(f"| {kind} | {whole} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], folder: Path) -> None:
    """accuracy.png: share against FLOPs kept and against cache kept, a panel a k; kinds-k*.png: a panel a kind."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: pip install 'vlmtrim[report]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, scores = averaged(report), scores_of(report)
    ks = sorted({key[0] for key in groups})
    figure, axes = plt.subplots(2, len(ks), figsize=(4 * len(ks), 7.2), sharey=True, squeeze=False)
    for row, (along, name) in zip(axes, KEPT.items(), strict=True):
        for axis, k in zip(row, ks, strict=True):
            for score in scores:
                _line(axis, groups, k, score, "all", along)
            axis.set(title=f"k = {k}", xlabel=name)
        row[0].set_ylabel("right answers")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=120)
    for k in ks:
        figure, axes = plt.subplots(3, 4, figsize=(14, 9), sharex=True)
        for axis, kind in zip(axes.flat, task.QUESTION_KINDS, strict=True):
            for score in scores:
                _line(axis, groups, k, score, kind)
            axis.set_title(kind)
        axes.flat[0].legend()
        figure.supxlabel(KEPT["flops_kept"])
        figure.supylabel("right answers")
        figure.tight_layout()
        figure.savefig(folder / f"kinds-k{k}.png", dpi=100)
    plt.close("all")
    print(f"plots in {folder}", file=sys.stderr)


def _line(axis: Any, groups: dict, k: int, score: str, name: str, along: str = "flops_kept") -> None:
    keys = sorted(key for key in groups if key[0] == k and key[2] == score)
    if not keys:
        return
    x = [groups[key][along] for key in keys]
    values = [groups[key][name] for key in keys]
    share = [value["share"] for value in values]
    errors = [[v["share"] - v["low"] for v in values], [v["high"] - v["share"] for v in values]]
    axis.errorbar(x, share, yerr=errors, label=score, marker="o", markersize=3, capsize=2, linewidth=1)


if __name__ == "__main__":
    main()
