"""Fuzzes what strangers give: bundles, pictures, prompts, templates, decoders, their vision and embedding graphs.

Prints what became of it; exit 1 on any failure.

scripts/fuzz.py bundles --count 10000 --seed 7 --jobs 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / part) for part in ("fuzz", "")]

WITHOUT_BUNDLES = ("templates", "decoders", "parts")
MODELS = [  # model, method and its arguments
    *(("tiny:llava", ["--k", "2"]), ("tiny:llava", ["--method", "none"]), ("tiny:llava_next", ["--k", "1"])),
    *(
        ("tiny:qwen2_vl", ["--k", "1"]),
        ("tiny:qwen2_5_vl", ["--k", "1"]),
        ("tiny:mllama", ["--method", "trimmed-llama"]),
    ),
    *(("tiny:mllama", ["--method", "none"]), ("demo", ["--dtype", "float32"])),
    ("tiny:qwen2_vl", ["--k", "1", "--weights", "int4", "--block", "32"]),
    ("tiny:llava", ["--k", "2", "--cache", "aircache"]),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("target", choices=("bundles", "pictures", "prompts", "templates", "decoders", "parts"))
    p.add_argument("--count", type=int, default=1000, help="inputs to try (default 1000)")
    p.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    p.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
    p.add_argument("--bundles", type=Path, help="folder of the bundles that are made first, kept for the next run")
    args = p.parse_args(argv)
    with TemporaryDirectory() as scratch:
        folders = [] if args.target in WITHOUT_BUNDLES else _bundles(args.bundles or Path(scratch))
        each = [args.count // args.jobs + (job < args.count % args.jobs) for job in range(args.jobs)]
        work = [(args.target, folders, count, args.seed * 1000 + job) for job, count in enumerate(each)]
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            reports = list(pool.map(_run, work))
    total = reports[0]
    for report in reports[1:]:
        total.tally += report.tally
        total.failures += report.failures
        total.peak, total.slowest = max(total.peak, report.peak), max(total.slowest, report.slowest)
    for name, detail in total.failures:
        print(f"{name}\n    {detail}")
    print(f"{args.target}: {total}")
    return 0 if total.clean else 1


def _run(work: tuple):
    import foreign
    import targets

    target, folders, count, seed = work
    if target in ("decoders", "parts"):
        return getattr(foreign, target)(count, seed)
    if target == "templates":
        return targets.templates(count, seed)
    return getattr(targets, target)(folders, count, seed)


def _bundles(parent: Path) -> list[Path]:
    """The bundles, exported where they are not there yet."""
    from vlmtrim.export import cli

    made = []
    for model, arguments in MODELS:
        folder = parent / "-".join([model.replace(":", "-"), *(a.strip("-") for a in arguments)])
        if not folder.exists():
            fits = [] if model == "demo" else ["--max-seq-len", "512"]
            assert cli.main(["--model", model, "--output", str(folder), *fits, *arguments]) == 0
        made.append(folder)
    return made


if __name__ == "__main__":
    sys.exit(main())
