"""How far a long piece of work is, on stderr where that is a terminal; work of two seconds goes without a word."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlmtrim.graphs.checksums import Progress

DELAY = 2.0  # seconds without a word
_INTERVAL = 0.25
_TIME = "{desc}: {elapsed}"
_BYTES = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"


@contextmanager
def running(label: str) -> Iterator[Progress]:
    """Show for how long the block has run; once it says how many bytes of how many are done, a bar of them."""
    done = total = 0

    def show(now: int, of: int) -> None:
        nonlocal done, total
        done, total = now, of

    def draw(start: float) -> None:
        if finished.wait(DELAY):
            return
        from tqdm import tqdm  # what is short does not pay for its import

        bar = tqdm(desc=label, unit="B", unit_scale=True, leave=False, file=sys.stderr, bar_format=_TIME)
        bar.start_t = start
        while not finished.wait(_INTERVAL):
            bar.bar_format, bar.n, bar.total = (_BYTES, done, total) if total else (_TIME, 0, None)
            bar.refresh()
        bar.close()

    finished = threading.Event()
    drawing = threading.Thread(target=draw, args=(time.time(),), daemon=True)
    if sys.stderr.isatty():
        drawing.start()
    try:
        yield show
    finally:
        finished.set()
        if drawing.ident is not None:
            drawing.join()
