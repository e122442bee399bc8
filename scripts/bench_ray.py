"""What Ray Serve's proxy adds to a request, and what a second replica gains.

    python scripts/bench_ray.py BUNDLE [--requests 100] [--clients 4]

serve-vlm, serve-vlm --ray and serve-vlm --ray --replicas 2 run at once and are asked in turns, one request each; then
each is asked by several clients. Prints medians, and ratios to serve-vlm alone in the same run.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.resources import files

import soak_server

KINDS = {"serve-vlm": [], "--ray": ["--ray"], "--ray --replicas 2": ["--ray", "--replicas", "2"]}


def question() -> bytes:
    picture = base64.b64encode((files("vlmtrim.export.demo") / "examples" / "word.png").read_bytes()).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    parts = [url, {"type": "text", "text": "Which word is written?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "stream": True}).encode()


def ask(server: soak_server.Started, body: bytes) -> tuple[float, float]:
    """Seconds to the first event and to the last."""
    began = time.perf_counter()
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", body, soak_server.JSON)
    answer = connection.getresponse()
    answer.readline()
    first = time.perf_counter() - began
    data = answer.read()
    connection.close()
    if answer.status != 200 or not data.endswith(b"data: [DONE]\n\n"):
        raise SystemExit(f"status {answer.status}: {data[-200:]!r}")
    return first, time.perf_counter() - began


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundle")
    p.add_argument("--requests", type=int, default=100, help="of each (default 100)")
    p.add_argument("--clients", type=int, default=4, help="at once, in the second part (default 4)")
    args = p.parse_args()
    body, alone, together = question(), {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        common = ["--backend", "ort-cpu", "--threads", "1", "--quiet"]
        servers = {
            k: stack.enter_context(soak_server.started(args.bundle, *more, *common)) for k, more in KINDS.items()
        }
        for number in range(args.requests + 10):
            for kind, server in servers.items():
                seconds = ask(server, body)
                if number >= 10:
                    alone[kind].append(seconds)
        for _ in range(5):
            for kind, server in servers.items():
                began = time.perf_counter()
                with ThreadPoolExecutor(args.clients) as pool:
                    list(pool.map(lambda _, server=server: ask(server, body), range(args.requests)))
                together[kind].append(args.requests / (time.perf_counter() - began))
    print(f"| | first event, ms | last event, ms | requests/s, {args.clients} clients | ratio |")
    print("|---|---|---|---|---|")
    base = statistics.median(together["serve-vlm"])
    for kind in KINDS:
        first, last = (1000 * statistics.median(times) for times in zip(*alone[kind], strict=True))
        rate = statistics.median(together[kind])
        print(f"| {kind} | {first:.1f} | {last:.1f} | {rate:.0f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
