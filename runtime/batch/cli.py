"""batch-vlm: ask a bundle about a folder, JSONL or Parquet of pictures, on one machine or a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmtrim.graphs.bundle import BundleError, open_bundle
from vlmtrim.runtime import cluster
from vlmtrim.runtime.batch.journal import Journal
from vlmtrim.runtime.batch.rows import pieces
from vlmtrim.runtime.batch.worker import Told
from vlmtrim.runtime.cli import Version
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.progress import running
from vlmtrim.runtime.select_backend import add_arguments
from vlmtrim.runtime.terminal import harmless

NEEDED = ("ray", "pyarrow")  # of the extra
PIECES = 2  # rows of a piece of a small batch, for each slot


def parser() -> argparse.ArgumentParser:
    """Arguments of batch-vlm."""
    p = argparse.ArgumentParser(
        prog="batch-vlm",
        description="Ask a bundle many things: rows of pictures and questions in, a record for each out. A row that "
        "cannot be answered is a record with its error. The same command again goes on where one was cut off.",
        epilog="Example: batch-vlm bundles/demo-fastv-k2-r0.5 pictures/ --prompt 'Which word is written?' "
        "--output answers.jsonl",
    )
    p.add_argument("bundle", help="bundle folder made by export-vlm; --max-batch of it is the number of slots")
    p.add_argument(
        "input",
        help="folder of pictures, or .jsonl or .parquet (or a folder of those) with image (path or contents, several "
        "as a list), prompt and, if rows have names, id",
    )
    p.add_argument("--version", action=Version, help="print the version and exit")
    p.add_argument("--output", required=True, metavar="OUT", help="file for the records, .jsonl or .parquet")
    p.add_argument("--prompt", metavar="TEXT", help="question of rows that have none")
    p.add_argument("--max-new-tokens", type=int, default=128, help="at most so many tokens (default 128)")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end answers before this text; repeatable"
    )
    p.add_argument("--retry-errors", action="store_true", help="ask rows again whose record is an error")
    p.add_argument("--slots", type=int, help="rows that an engine answers at once (default: --max-batch of the bundle)")
    add_arguments(p)
    group = p.add_argument_group("Ray", "--threads (default 1 here) are also the CPUs that each engine reserves")
    cluster.add_arguments(group)
    p.add_argument("--verify", action="store_true", help="hash every byte of the bundle, also of large unchanged files")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    p.add_argument("-v", "--verbose", action="store_true", help="what Ray says")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 all rows answered, 1 some are errors, 2 bad input, 130 interrupted."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except (BundleError, RuntimeRefusal) as error:
        print(f"batch-vlm: {harmless(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("batch-vlm: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    ranges = {"max_new_tokens": (1, 1 << 20), "slots": (1, 4096), "threads": (0, 4096), "gpus_per_replica": (0, 64)}
    for name, (low, high) in ranges.items():
        value = vars(args)[name]
        if value is not None and not low <= value <= high:
            raise RuntimeRefusal(f"--{name.replace('_', '-')} is {value}; give a number from {low} to {high}")
    cluster.replicas(args.replicas)
    cluster.check_installed("batch-vlm", NEEDED, "cpu,ray")
    cluster.prepare_environment()
    with running("checking the bundle") as show:
        bundle = open_bundle(args.bundle, args.verify, show)
    told = Told(
        bundle=str(Path(args.bundle).resolve()),
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        backend=args.backend,
        threads=cluster.threads(args),
        activations=args.activations,
        slots=args.slots,
        verify=args.verify,
    )
    from vlmtrim.runtime.batch.job import job_of, run

    slots = args.slots or bundle.contract.dims["B"][1]
    source = str(Path(args.input).resolve())
    pieces(source, args.prompt, (), PIECES * slots)  # what cannot be asked leaves no files
    journal = Journal(args.output, job_of(told, bundle.digest, source), args.retry_errors)
    try:
        before = len(journal.done)
        outcome = run(args, told, pieces(source, args.prompt, journal.done, PIECES * slots), journal)
        journal.finish()
    finally:
        journal.close()
    rate = (outcome.answered + outcome.errors) / outcome.seconds
    print(
        f"batch-vlm: {outcome.answered} rows answered, {outcome.errors} errors, {before} there before, "
        f"{outcome.missing} missing; {outcome.seconds:.1f} s, {rate:.1f} rows/s: {args.output}",
        file=sys.stderr,
    )
    return int(bool(journal.errors or outcome.missing))


if __name__ == "__main__":
    sys.exit(main())
