"""What every driver speaks: one JSON object a line, requests on stdin, answers on stdout. Standard library only.

Requests: ``{"do": "load", "packages": [...], ...}``, ``{"do": "ask", "turn": N, "new_tokens": N, "small": bool, ...}``,
``{"do": "quit"}``. An answer is an object, or ``{"error": "one line"}``. Libraries that print go to stderr: file
descriptor 1 is moved out of their way. ``small`` asks about a small picture, to warm up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

THREADS = 2
FULL = 896, 672  # pixels; 32 x 24 visual tokens of 28 x 28 pixels
SMALL = 224, 168  # 8 x 6 visual tokens
START, END = "<|im_start|>", "<|im_end|>"


def question(turn: int) -> str:
    """What is asked about the picture of a turn: always as many tokens, never the same text twice."""
    return f"What is in picture number {turn:03}?"


def prompt(turn: int, picture: str) -> str:
    """The whole prompt as the checkpoint's chat template writes it; ``picture`` stands for the picture."""
    return f"{START}user\n{picture}{question(turn)}{END}\n{START}assistant\n"


def picture(request: dict[str, Any]) -> tuple[tuple[int, int], bytes]:
    """Width and height, and RGB rows of the picture of a turn: blocks of random colours. No two turns share one, so no
    cache helps."""
    draw, side = random.Random(request["turn"]), 56
    width, height = SMALL if request.get("small") else FULL
    rows = []
    for _ in range(height // side):
        row = b"".join(draw.randbytes(3) * side for _ in range(width // side))
        rows.append(row * side)
    return (width, height), b"".join(rows)


def png(request: dict[str, Any]) -> bytes:
    """The same as a file, not compressed, for peers that take files alone."""
    (width, height), data = picture(request)
    stride = width * 3
    lines = b"".join(b"\0" + data[start : start + stride] for start in range(0, len(data), stride))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines, 0)),
        (b"IEND", b""),
    )
    body = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def memory(*processes: int) -> dict[str, int]:
    """Resident bytes of processes (this one if none is named), now and at most."""
    found = {"rss": 0, "peak": 0}
    for process in processes or (os.getpid(),):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        found["rss"] += int(sizes["VmRSS"]) * 1024
        found["peak"] += int(sizes["VmHWM"]) * 1024
    return found


def versions(packages: list[str]) -> dict[str, str]:
    """Of the packages named that are installed here."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def timed(start: float, steps: Iterable[Any]) -> dict[str, float]:
    """TTFT and decode tokens a second of an iterator that yields once a token."""
    times = [time.perf_counter() for _ in steps]
    return rates(start, times)


def rates(start: float, times: list[float]) -> dict[str, float]:
    """The same from the moments at which tokens arrived."""
    return {"ttft": times[0] - start, "rate": (len(times) - 1) / (times[-1] - times[0]), "new": len(times)}


def serve(load: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer requests until ``quit`` or the end of stdin; ``load`` returns what answers ``ask``."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ask: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            if request["do"] == "load":
                start = time.perf_counter()
                ask = load(request)
                answer = {"load": time.perf_counter() - start, "versions": versions(request["packages"])}
            elif ask is None:
                raise RuntimeError("nothing is loaded; send load first")
            else:
                answer = ask(request)
                answer = {**memory(), **answer}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        out.write(json.dumps(answer) + "\n")
