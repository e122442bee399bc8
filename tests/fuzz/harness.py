"""Runs attempts in processes of their own, so that a crash, a hang or a full memory is seen and outlived."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = 10  # an attempt that takes longer hangs
KINDS = ("refused", "ran", "traceback", "crash", "hang", "memory")
MEMORY = 1_500_000_000  # bytes of resident memory that an attempt may reach


@dataclass
class Report:
    """What became of the attempts: ``tally`` counts refused, ran, traceback, crash, hang and memory."""

    tally: Counter = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    peak: int = 0
    slowest: float = 0.0

    def __str__(self) -> str:
        counts = " ".join(f"{kind} {self.tally[kind]}" for kind in KINDS)
        return (
            f"{sum(self.tally.values())} tried: {counts}; peak {self.peak / 1e6:.0f} MB, slowest {self.slowest:.1f} s"
        )

    @property
    def clean(self) -> bool:
        """Whether everything ran or was refused."""
        return not self.failures

    def add(self, name: str, kind: str, detail: str, peak: int, seconds: float) -> None:
        """Count an attempt."""
        self.tally[kind] += 1
        self.peak, self.slowest = max(self.peak, peak), max(self.slowest, seconds)
        if kind not in ("refused", "ran"):
            self.failures.append((name, f"{kind}: {detail}"))


def attempt(name: str, work: Callable[[], None], report: Report) -> None:
    """Run ``work`` in a child. It refuses by BundleError or RuntimeRefusal; any other exception is a traceback."""
    read, write = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = _child(work, write)
        os._exit(status)
    os.close(write)
    said, hung = b"", False
    while True:
        left = start + SECONDS - time.monotonic()
        ready = select.select([read], [], [], max(left, 0))[0]
        if not ready:
            os.kill(child, signal.SIGKILL)
            hung = True
            break
        data = os.read(read, 65536)
        if not data:
            break
        said += data
    os.close(read)
    _, status, usage = os.wait4(child, 0)
    seconds, peak = time.monotonic() - start, usage.ru_maxrss * 1024
    if hung:
        report.add(name, "hang", f"more than {SECONDS} s", peak, seconds)
    elif os.WIFSIGNALED(status) or not said:
        report.add(
            name, "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no word", peak, seconds
        )
    elif peak > MEMORY:
        report.add(name, "memory", f"{peak / 1e6:.0f} MB", peak, seconds)
    else:
        kind, detail = json.loads(said)
        report.add(name, kind, detail, peak, seconds)


def _child(work: Callable[[], None], write: int) -> int:
    from vlmtrim.graphs.bundle import BundleError
    from vlmtrim.runtime.errors import RuntimeRefusal

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        work()
        outcome = ["ran", ""]
    except (BundleError, RuntimeRefusal) as error:
        fine = "\n" not in str(error) and len(str(error)) < 2000
        outcome = ["refused", ""] if fine else ["traceback", f"a refusal of many lines: {str(error)[:300]!r}"]
    except BaseException:
        outcome = ["traceback", "".join(traceback.format_exc().splitlines(keepends=True)[-6:])]
    os.write(write, json.dumps(outcome).encode())
    sys.stdout.flush()
    return 0
