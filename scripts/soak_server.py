"""Asks a running serve-vlm many things at once and prints what came of it: answers, memory, slots, time to be ready.

    python scripts/soak_server.py BUNDLE [--requests 1000] [--clients 8] [--cancel 300] [--hostile 0.05] [--seed 7]

BUNDLE is of ``export-vlm --model demo --dtype float32 --max-batch 2``. Every answer is compared with what the same
conversation gets from the bundle alone; a hostile request must be refused with its own status. Exit status 1 where an
answer is wrong, memory grows by more than 5 % after the first fifth, or a slot is not free at the end.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

GROWTH = 1.05  # of resident memory that may be left at the end
JSON = {"content-type": "application/json"}


@dataclass
class Started:
    """serve-vlm in a process of its own."""

    process: subprocess.Popen
    port: int
    ready: float  # seconds from start to ready
    lines: list[str] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        """A connection to it."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def resident(self) -> int:
        """Bytes of memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) << 10  # type: ignore[index]


@contextmanager
def started(bundle: str | Path, *arguments: str) -> Iterator[Started]:
    """Ends with SIGTERM, and must end well, unless it has ended by itself."""
    command = [sys.executable, "-m", "vlmtrim.runtime.serve.cli", str(bundle), *arguments]
    if "--port" not in arguments:
        command += ["--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    found = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"is ready on http://127\.0\.0\.1:(\d+)", line):
            break
    if found is None:
        raise SystemExit("".join(lines))
    server = Started(process, int(found[1]), time.perf_counter() - began, lines)
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            if process.wait(30):
                raise SystemExit("serve-vlm ended badly:\n" + "".join(lines[-20:]))
    finally:
        process.kill()
        process.wait()
        reader.join(5)


def conversations() -> list[list[dict[str, Any]]]:
    """Of the demo's example pictures: single questions, text first or picture first, two turns, and words alone."""
    folder = files("vlmtrim.export.demo") / "examples"
    made = []
    for entry in json.loads((folder / "examples.json").read_text()):
        data = base64.b64encode((folder / entry["file"]).read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": entry["question"]},
        ]
        asked = {"role": "user", "content": parts}
        second = {"role": "user", "content": "What colour is the background?"}
        made += [[asked], [{"role": "user", "content": parts[::-1]}]]
        made += [[asked, {"role": "assistant", "content": entry["answer"]}, second]]
    return [*made, [{"role": "user", "content": "Which word is written? </s> <image>"}]]


def alone(bundle: str | Path, talks: list[list[dict[str, Any]]]) -> list[str]:
    """What a conversation gets from the runtime without slots or HTTP: one prefill of all of it, greedily."""
    from vlmtrim import runtime
    from vlmtrim.graphs.bundle import open_bundle
    from vlmtrim.runtime.serve.content import messages
    from vlmtrim.runtime.serve.schema import read
    from vlmtrim.runtime.serve.settings import Limits
    from vlmtrim.runtime.slots.request import Preparer

    opened, answers = open_bundle(bundle), []
    with runtime.open(bundle) as chat:
        prepare = Preparer(opened.contract, chat.session.prompter, chat.session.processor)
        for talk in talks:
            turns, _ = messages(read(json.dumps({"messages": talk}).encode(), 1000).turns, Limits())
            request = prepare(turns, None, None, (), None)
            session, stream, text = chat.session, chat.session.prompter.decode_stream(), ""
            session.reset()
            logits = session.prefill([request.ids], request.pictures).logits
            while session.room() > 0 and (token := int(logits[0].argmax())) not in opened.contract.eos_token_ids:
                text += stream.step(token)
                logits = session.decode(logits.argmax(axis=-1))
            answers.append(text)
    return answers


def hostile() -> list[tuple[bytes, dict[str, str], int]]:
    """(body, headers, the status that it must get)."""

    def asking(url: str, count: int = 1, **fields: Any) -> bytes:
        parts = [{"type": "image_url", "image_url": {"url": url}}] * count
        return json.dumps({"messages": [{"role": "user", "content": parts}], **fields}).encode()

    def coded(data: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(data).decode()

    bomb = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d494844520000ea600000ea600100000000a8a948ef")
    return [
        (b"{" * 100_000, JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * ((32 << 20) + 1), JSON, 413),
        (asking("http://169.254.169.254/latest"), JSON, 400),
        (asking("file:///etc/passwd"), JSON, 400),
        (asking(coded(bomb)), JSON, 400),
        (asking(coded(b"%!PS-Adobe-3.0 EPSF-3.0\n")), JSON, 400),
        (asking(coded(bytes(5000))), JSON, 400),
        (asking("data:image/png;base64,AAAA", 1000), JSON, 400),
        (asking("data:image/png;base64,AAAA", n_discard=-5), JSON, 400),
        (asking("data:image/png;base64,AAAA", max_tokens=2**70), JSON, 400),
        (json.dumps({"messages": [{"role": "user", "content": "a " * 300_000}]}).encode(), JSON, 400),
    ]


@dataclass
class Soak:
    """One run: what is asked, and what came of it."""

    server: Started
    talks: list[list[dict[str, Any]]]
    expected: list[str]
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def one(self, number: int, plan: str, seed: int) -> None:
        """A request, by its plan: ask, cancel or hostile."""
        rng = random.Random(seed * 1_000_003 + number)
        try:
            if plan == "hostile":
                self._hostile(*rng.choice(HOSTILE))
            else:
                self._ask(rng, plan == "cancel")
        except (OSError, http.client.HTTPException) as error:
            self.wrong.append(f"request {number} ({plan}): {type(error).__name__} {error}")
        self.seen[plan] += 1
        self.memory.append(self.server.resident())

    def _ask(self, rng: random.Random, cancel: bool) -> None:
        which, stream = rng.randrange(len(self.talks)), rng.random() < 0.5
        connection = self.server.connect()
        body = json.dumps({"messages": self.talks[which], "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, JSON)
        if cancel:
            time.sleep(rng.random() * 0.05)
            connection.close()
            return
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        text = said(data, stream) if answer.status == 200 else f"status {answer.status}"
        if text != self.expected[which]:
            self.wrong.append(f"{self.talks[which][-1]['content']!r:.80}: {text!r}, alone {self.expected[which]!r}")

    def _hostile(self, body: bytes, headers: dict[str, str], status: int) -> None:
        connection = self.server.connect()
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status != status:
            self.wrong.append(f"hostile {body[:60]!r}: {answer.status}, not {status}")

    def run(self, requests: int, clients: int, cancelled: int, share: float, seed: int) -> None:
        """All of it, in an order that the seed says."""
        plans = ["cancel"] * cancelled + ["hostile"] * round(requests * share)
        plans += ["ask"] * (requests - len(plans))
        random.Random(seed).shuffle(plans)
        with ThreadPoolExecutor(clients) as pool:
            for done in [pool.submit(self.one, number, plan, seed) for number, plan in enumerate(plans)]:
                done.result()

    def idle(self) -> dict[str, Any]:
        """The server's state once nothing is asked; waits a little for what was cancelled."""
        for _ in range(100):
            connection = self.server.connect()
            connection.request("GET", "/health/ready")
            state = json.loads(connection.getresponse().read())
            connection.close()
            if not state["live"] and not state["waiting"]:
                break
            time.sleep(0.05)
        return state

    def growth(self) -> float:
        """Memory at the end over memory after the first fifth, both as medians of a twentieth of the requests."""
        few = max(1, len(self.memory) // 20)
        start = len(self.memory) // 5
        early, late = sorted(self.memory[start : start + few]), sorted(self.memory[-few:])
        return late[few // 2] / early[few // 2]


HOSTILE = hostile()


def said(data: bytes, stream: bool) -> str:
    """The text of an answer; a stream must end as streams do."""
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    *events, done, rest = data.decode().split("\n\n")
    if (done, rest) != ("data: [DONE]", ""):
        return f"a stream that ends with {done!r:.80}"
    return "".join(json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events)


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundle")
    p.add_argument("--requests", type=int, default=1000)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--cancel", type=int, default=300, help="of them, cut off at a random moment (default 300)")
    p.add_argument("--hostile", type=float, default=0.05, help="share of them (default 0.05)")
    p.add_argument("--seed", type=int, default=7)
    args = p.parse_args()
    talks = conversations()
    expected = alone(args.bundle, talks)
    with started(args.bundle, "--quiet") as server:
        soak = Soak(server, talks, expected)
        began = time.perf_counter()
        soak.run(args.requests, args.clients, args.cancel, args.hostile, args.seed)
        seconds, state = time.perf_counter() - began, soak.idle()
        resident = server.resident()
    print(f"| start to ready | {server.ready:.2f} s |\n|---|---|")
    print(f"| requests, clients, slots | {args.requests}, {args.clients}, {state['slots']} |")
    print(
        "| answered, cancelled, hostile | " + ", ".join(str(soak.seen[n]) for n in ("ask", "cancel", "hostile")) + " |"
    )
    print(f"| wrong | {len(soak.wrong)} |")
    print(f"| requests a second | {args.requests / seconds:.1f} |")
    print(f"| memory at the end, over that after the first fifth | {resident >> 20} MiB, {soak.growth():.3f} |")
    print(f"| slots taken, requests waiting at the end | {state['live']}, {state['waiting']} |")
    print(*soak.wrong[:20], sep="\n")
    return int(bool(soak.wrong) or soak.growth() > GROWTH or bool(state["live"] or state["waiting"]))


if __name__ == "__main__":
    sys.exit(main())
