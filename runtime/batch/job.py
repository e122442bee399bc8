"""A batch from its rows to its journal: Ray Data hands pieces to a pool of workers, this process alone writes."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray.data
from ray.exceptions import RayError
from tqdm import tqdm

from vlmtrim.runtime import cluster
from vlmtrim.runtime.batch.journal import Journal
from vlmtrim.runtime.batch.rows import Piece
from vlmtrim.runtime.batch.worker import REFUSED, Told, Worker
from vlmtrim.runtime.errors import RuntimeRefusal

BLOCK = 1024  # bytes of records that a worker hands over at once; a kill of the job loses no more of each piece


@dataclass(frozen=True)
class Outcome:
    """What came of a run: rows answered, rows that are errors, rows without either, and seconds of work."""

    answered: int
    errors: int
    missing: int
    seconds: float


def run(args: argparse.Namespace, told: Told, pieces: list[Piece], journal: Journal) -> Outcome:
    """Ask what is left. Raises RuntimeRefusal where no worker can be opened, KeyboardInterrupt at a signal."""
    left, before, errors = sum(piece.left for piece in pieces), len(journal.done), journal.errors
    began = time.perf_counter()
    if left:
        cluster.join(args, shown=args.verbose)
        cluster.on_signals(_interrupt)
        try:
            _answer(args, told, pieces, journal, left)
        except (RayError, RuntimeError) as error:
            raise RuntimeRefusal(f"Ray could not go on ({type(error).__name__}: {error})") from error
        finally:
            ray.shutdown()
    new, failed = len(journal.done) - before, journal.errors - errors
    return Outcome(new - failed, failed, left - new, time.perf_counter() - began)


def _answer(args: argparse.Namespace, told: Told, pieces: list[Piece], journal: Journal, left: int) -> None:
    there = len(journal.done)
    hidden = args.quiet or not sys.stderr.isatty()
    with tqdm(total=there + left, initial=there, unit="row", file=sys.stderr, disable=hidden) as bar:
        for name, failed, line in _records(args, told, pieces):
            if journal.write(name, line, failed):
                bar.update()
                bar.set_postfix(errors=journal.errors, refresh=False)


def _records(args: argparse.Namespace, told: Told, pieces: list[Piece]) -> Iterator[tuple[str, bool, str]]:
    """Id, whether it is an error, and line of every row, as they come."""
    low, high = (min(bound, len(pieces)) for bound in cluster.replicas(args.replicas))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks
    context.target_max_block_size = BLOCK
    context.max_errored_blocks = -1  # a piece that fails is missing in the end, and others go on
    logging.getLogger("ray.data").setLevel("INFO" if args.verbose else "CRITICAL")
    pool = ray.data.ActorPoolStrategy(
        min_size=low,
        max_size=high,
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2,  # one piece begins before the other has ended, so that slots stay full
        enable_true_multi_threading=True,
    )
    asked = ray.data.from_items([{"piece": piece.text()} for piece in pieces], override_num_blocks=len(pieces))
    answered = asked.flat_map(
        Worker,
        fn_constructor_args=(told, Tries()),
        compute=pool,
        num_cpus=told.threads,
        num_gpus=cluster.gpus(args),
    )
    for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
        for name, failed, line in zip(batch["id"], batch["failed"], batch["line"], strict=True):
            if name == REFUSED:
                raise RuntimeRefusal(str(line))
            yield str(name), bool(failed), str(line)


class Tries:
    """Counts for all workers how often a piece was begun: Ray begins it again for ever where its process dies."""

    def __init__(self):
        self._counts = ray.remote(num_cpus=0)(_Counts).remote()

    def __call__(self, piece: str) -> int:
        """With this time."""
        return ray.get(self._counts.add.remote(piece))


class _Counts:
    def __init__(self):
        self._count: Counter[str] = Counter()

    def add(self, name: str) -> int:
        self._count[name] += 1
        return self._count[name]


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(number)


def job_of(told: Told, digest: str, source: str) -> dict[str, object]:
    """What decides the answers of a batch."""
    return {
        "bundle": digest,
        "input": str(Path(source).resolve()),
        "prompt": told.prompt,
        "max_new_tokens": told.max_new_tokens,
        "stop": list(told.stop),
    }
