"""llama.cpp's server, a process of its own; load: ``server`` (the program), ``text`` and ``mmproj`` (GGUF files)."""

from __future__ import annotations

import atexit
import base64
import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import wire

# The log's lines around the tower: minutes.seconds.milliseconds.microseconds since the start.
_ENCODING = re.compile(r"^([\d.]+) .*encoding mtmd batch", re.M)
_DECODING = re.compile(r"^([\d.]+) .*decoding image batch 1/", re.M)


def load(request: dict[str, Any]) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkstemp(prefix="llama-server-", suffix=".log")[1])
    threads = ("-t", str(wire.THREADS), "-tb", str(wire.THREADS))
    files = ("-m", request["text"], "--mmproj", request["mmproj"])
    server = subprocess.Popen(
        [
            request["server"],
            *files,
            *threads,
            "-c",
            "2048",
            "-np",
            "1",
            "--cache-ram",
            "0",
            "--port",
            str(port),
            "-lv",
            "4",
        ],
        stdout=subprocess.DEVNULL,
        stderr=log.open("wb"),
    )
    atexit.register(log.unlink)
    atexit.register(server.kill)
    url = f"http://127.0.0.1:{port}"
    marker = _wait(server, url, log)

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        turn = request["turn"]
        body = {
            "prompt": {
                "prompt_string": wire.prompt(turn, marker),
                "multimodal_data": [base64.b64encode(wire.png(request)).decode()],
            },
            "n_predict": request["new_tokens"],
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
            "stream": True,
        }
        data, logged = json.dumps(body).encode(), log.stat().st_size
        start, times, said, last = time.perf_counter(), [], "", {}
        call = urllib.request.Request(f"{url}/completion", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
                    said += last.get("content", "")
                    times += [time.perf_counter()] if last.get("tokens") or last.get("content") else []
        timings = last["timings"]
        written = log.read_bytes()[logged:].decode(errors="replace")
        return {
            "ttft": times[0] - start,
            "rate": timings["predicted_per_second"],
            "new": timings["predicted_n"],
            "text": said,
            "first": timings["prompt_ms"] / 1000,
            "tokens": timings["prompt_n"],
            **_tower(written),
            **wire.memory(server.pid),
        }

    return ask


def _tower(log: str) -> dict[str, float]:
    marks = [pattern.findall(log) for pattern in (_ENCODING, _DECODING)]
    if not all(marks):
        return {}
    start, end = (_seconds(found[0]) for found in marks)
    return {"vision": end - start}


def _seconds(stamp: str) -> float:
    minutes, seconds, milli, micro = map(int, stamp.split("."))
    return minutes * 60 + seconds + milli / 1e3 + micro / 1e6


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> str:
    """Until the model is loaded; returns what marks a picture in a prompt."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health"), urllib.request.urlopen(f"{url}/props") as answer:
                return json.load(answer)["media_marker"]
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    said = log.read_text(errors="replace").strip().splitlines()
    raise RuntimeError(f"llama-server ended with {server.returncode}: {said[-1] if said else 'no output'}")


if __name__ == "__main__":
    wire.serve(load)
