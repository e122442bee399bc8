#!/usr/bin/env python3
"""A whole report in one command: random LLaVA-1.5-7B, dense and pruned, as bundles and in PyTorch, on this GPU.

Stages, each of which skips what is done: make (random checkpoint), export (bundles), engines, bench (bundles side by
side, dense with every ratio), pytorch (transformers eager, SDPA, compiled; FastV in PyTorch), table. Nothing is
downloaded. A backend that does not work here is told with its reason, and the next one is measured. --like tiny runs
all of it on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_table
import torch

from vlmtrim.export import pipeline
from vlmtrim.export.checkpoint import load_family
from vlmtrim.export.families import llava
from vlmtrim.export.job import Job
from vlmtrim.export.weights import large, tiny
from vlmtrim.graphs import FastV
from vlmtrim.graphs.bundle import open_bundle, seal
from vlmtrim.runtime.engines import fingerprint
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure import bench, machine
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.progress import running
from vlmtrim.runtime.prompt import Conversation, Prompter

STAGES = ("make", "export", "engines", "bench", "pytorch", "table")
PROMPT = "What is in the pictures?"
SPARE = 4e9  # bytes of disk to leave


def say(stage: str, text: str) -> None:
    print(f"{stage}: {text}", flush=True)


def label(r: float) -> str:
    """Folder name of a ratio."""
    return "dense" if r == 0 else f"r{r:g}"


def make(args: argparse.Namespace) -> None:
    target = args.work / "checkpoint"
    if target.exists():
        return say("make", "there already")
    start, fresh = time.perf_counter(), args.work / "checkpoint.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    if args.like == "tiny":
        tiny.write_checkpoint(load_family("llava"), fresh)
    else:
        large.write_config(fresh, large.config_of(args.like))
        with running("weights") as show:
            large.write_weights(fresh, torch.float16, 5_000_000_000, progress=show)
    fresh.rename(target)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    return say("make", f"{size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


def export(args: argparse.Namespace) -> None:
    start, traces, done = time.perf_counter(), {}, 0
    for r in args.ratios:
        output = args.work / label(r)
        if output.exists():
            continue
        job = Job(
            model=str(args.work / "checkpoint"),
            output=str(output),
            method=None if r == 0 else FastV(args.k, r),
            images=args.images,
            max_seq_len=args.tokens + args.new_tokens,
        )
        pipeline.export(job, args.work / "checkpoint", traces)
        done += 1
    return say("export", f"{done} of {len(args.ratios)} bundles in {time.perf_counter() - start:.0f} s")


def has_engines(bundle: Path, library: str) -> bool:
    prints = bundle / fingerprint.FILE
    return prints.is_file() and all(e["library"] == library for e in json.loads(prints.read_text()).values())


def ensure_engines(bundle: Path, library: str) -> str | None:
    """Build what is missing, in a process of its own; returns why it cannot be built."""
    if not library.startswith("tensorrt") or has_engines(bundle, library):
        return None
    needed = sum(path.stat().st_size for path in bundle.glob("*.safetensors"))
    if shutil.disk_usage(bundle).free < needed + SPARE:
        return f"{needed / 1e9:.1f} GB of engines do not fit on the disk"
    command = [sys.executable, "-m", "vlmtrim.runtime.engines", str(bundle), "--library", library]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else last_line(done.stderr)


def drop_engines(bundle: Path) -> None:
    for path in (*bundle.glob("*.engine"), bundle / fingerprint.FILE):
        path.unlink(missing_ok=True)
    seal(bundle)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def engines(args: argparse.Namespace) -> None:
    for library in (backend for backend in args.backend if backend.startswith("tensorrt")):
        for r in args.ratios:
            start = time.perf_counter()
            reason = ensure_engines(args.work / label(r), library)
            say("engines", f"{library} {label(r)}: {reason or f'{time.perf_counter() - start:.0f} s'}")
    if not any(backend.startswith("tensorrt") for backend in args.backend):
        say("engines", f"{', '.join(args.backend)}: none needed")


def bench_bundles(args: argparse.Namespace) -> None:
    """Every ratio beside the dense bundle, each pair in a process of its own."""
    for backend in args.backend:
        for r in args.ratios[1:]:
            out = args.work / f"bench-{backend}-{label(r)}.json"
            if out.exists() and "failed" not in json.loads(out.read_text()):
                say("bench", f"{out.name} there already")
                continue
            pair = [args.work / label(0), args.work / label(r)]
            reason = next(filter(None, (ensure_engines(bundle, backend) for bundle in pair)), None)
            if reason is None:
                reason = bench_pair(args, backend, pair, out)
                if reason is None and backend.startswith("tensorrt") and r == args.ratios[1]:
                    plain = out.with_name(f"bench-{backend}-{label(r)}-plain.json")
                    reason = bench_pair(args, backend, pair[1:], plain, "--cuda-graphs", "off")
            if reason is not None:
                out.write_text(json.dumps({"backend": backend, "failed": reason}))
            say("bench", f"{backend} {label(r)}: {reason or out.name}")
            if reason is None and len(args.ratios) > 2 and backend.startswith("tensorrt"):
                free, weights = (
                    shutil.disk_usage(args.work).free,
                    sum(p.stat().st_size for p in pair[1].glob("*.engine")),
                )
                if free < weights + SPARE:
                    drop_engines(pair[1])


def bench_pair(args: argparse.Namespace, backend: str, pair: list[Path], out: Path, *more: str) -> str | None:
    command = [sys.executable, "-m", "vlmtrim.runtime.bench_cli", *map(str, pair), "--backend", backend]
    command += ["--images", str(args.images), "--prompt", PROMPT, "--prompt-tokens", str(args.tokens)]
    command += ["--new-tokens", str(args.new_tokens), "--repeat", str(args.rounds), "--json", str(out), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return f"not done after {args.limit} s"
    return None if done.returncode == 0 else last_line(done.stderr)


class Torch:
    """The model in PyTorch and the prompt that the bundles get."""

    def __init__(self, args: argparse.Namespace):
        bundle = open_bundle(args.work / label(0))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        family, checkpoint = load_family("llava"), args.work / "checkpoint"
        self.model = family.MODEL_CLASS.from_pretrained(checkpoint, dtype="auto").eval().to(self.device)
        pictures = load_processor(bundle.files, bundle.contract)([generated_picture(i) for i in range(args.images)])
        prompter = Prompter(bundle.files, bundle.contract)
        ids = prompter.expand_images(Conversation(prompter).ask(PROMPT, args.images), pictures.tokens)
        self.ids = torch.tensor([bench.fill(ids, args.tokens, bundle.contract)])
        self.pixels = torch.from_numpy(pictures.inputs["pixel_values"]).to(self.model.dtype)
        self.new_tokens = args.new_tokens

    def now(self) -> float:
        """Host clock, after all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, begin: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], step: Callable, cache: Any) -> dict:
        """Seconds to the first token and per token after it; ``begin`` and ``step`` return logits [V]."""
        start = self.now()
        token = begin(self.ids.to(self.device), self.pixels.to(self.device)).argmax().item()
        first = self.now()
        for _ in range(self.new_tokens - 1):
            token = step(torch.tensor([[token]], device=self.device)).argmax().item()
        end = self.now()
        layers = cache().layers
        return {
            "ttft": first - start,
            "tpot": (end - first) / (self.new_tokens - 1),
            "caches": sum(layer.keys.nbytes + layer.values.nbytes for layer in layers),
            "entries": [layer.keys.shape[2] for layer in layers],
        }

    @torch.no_grad()
    def dense(self, attention: str) -> dict:
        """transformers' own forward."""
        from transformers import DynamicCache

        self.model.set_attn_implementation(attention)
        cache, forward = DynamicCache(), self.model.forward

        def run(**inputs: torch.Tensor) -> torch.Tensor:
            return forward(past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs).logits[0, -1]

        return self.timed(
            lambda ids, pixels: run(input_ids=ids, pixel_values=pixels), lambda t: run(input_ids=t), lambda: cache
        )

    def fastv(self, attention: str, k: int, r: float) -> dict:
        """FastV in PyTorch: the attention of layer k-1 is eager, that of the others as asked."""
        from torch_fastv import TorchFastV

        self.model.set_attn_implementation(attention)
        run = TorchFastV(self.model, k, r, attention)
        return self.timed(run.prefill, run.decode, lambda: run.cache)

    @torch.no_grad()
    def compiled(self) -> dict:
        """``generate`` with a static cache, which compiles the decode step on CUDA; times from its streamer."""
        self.model.set_attn_implementation("sdpa")
        stamps: list[float] = []

        class Stamps:
            def put(self, value: torch.Tensor) -> None:
                stamps.append(time.perf_counter())

            def end(self) -> None: ...

        start = self.now()
        self.model.generate(
            input_ids=self.ids.to(self.device),
            attention_mask=torch.ones_like(self.ids).to(self.device),
            pixel_values=self.pixels.to(self.device),
            do_sample=False,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            cache_implementation="static",
            streamer=Stamps(),
        )
        first, last = stamps[1], stamps[-1]  # the first stamp is of the prompt
        return {"ttft": first - start, "tpot": (last - first) / (len(stamps) - 2), "caches": None, "entries": None}


def pytorch(args: argparse.Namespace) -> None:
    out = args.work / "pytorch.json"
    if out.exists():
        return say("pytorch", "there already")
    side = Torch(args)
    jobs: dict[str, Callable[[], dict]] = {f"{a} dense": (lambda a=a: side.dense(a)) for a in ("eager", "sdpa")}
    for r in args.ratios[1:]:
        for a in ("eager", "sdpa"):
            jobs[f"{a} {label(r)}"] = lambda a=a, r=r: side.fastv(a, args.k, r)
    samples: dict[str, list[dict]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    rounds(jobs, samples, failed, args.rounds)
    gpu = machine.gpu() if side.device.type == "cuda" else None
    record = {
        "device": machine.cpu() if gpu is None else gpu.name,
        "driver": None if gpu is None else gpu.driver,
        "versions": machine.versions(),
        "tokens": side.ids.shape[1],
        "samples": samples,
        "failed": {**failed, "compiled dense": "the process ended while it compiled"},
    }
    out.write_text(json.dumps(record, indent=2))  # a compiler may take the process with it
    if side.device.type == "cuda":
        samples["compiled dense"] = []
        rounds({"compiled dense": side.compiled}, samples, failed, args.rounds)
    else:
        failed["compiled dense"] = "transformers compiles on CUDA only"
    out.write_text(json.dumps({**record, "failed": failed}, indent=2))
    return say("pytorch", f"{sum(map(bool, samples.values()))} measured, {len(failed)} not")


def rounds(jobs: Mapping[str, Callable[[], dict]], samples: dict, failed: dict[str, str], count: int) -> None:
    """One warm-up and ``count`` rounds, taking turns; what fails is left out with its reason."""
    for turn in range(count + 1):
        for name, job in jobs.items():
            if name in failed:
                continue
            try:
                sample = job()
            except Exception as error:  # out of memory, no compiler, an older transformers: the others go on
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            if turn:
                samples[name].append(sample)


def table(args: argparse.Namespace) -> None:
    benches = [json.loads(path.read_text()) for path in sorted(args.work.glob("bench-*.json"))]
    path = args.work / "pytorch.json"
    side = json.loads(path.read_text()) if path.is_file() else {}
    contract, gpu = open_bundle(args.work / label(0)).contract, machine.gpu() if torch.cuda.is_available() else None
    found = gpu_table.rows(benches, side, contract, bench.known_peak(None, gpu, contract.dtype))
    device = next((r["device"] for r in (*benches, side) if "device" in r), "nothing was measured")
    print(f"\n{args.like}, k={args.k}, {args.tokens} prompt tokens, {args.images} pictures, {contract.dtype}; {device}")
    print(
        f"{'':26}{'TTFT ms':>9}{'prefill':>9}{'TPOT ms':>9}{'tokens/s':>9}{'GB/s':>8}{'of peak':>8}{'speed-up':>9}"
        f"{'by FLOPs':>9}  caches (contract) MB"
    )
    for row in found:
        print(gpu_table.line(row))
    reasons = {report["backend"]: report["failed"] for report in benches if "failed" in report}
    reasons |= {f"PyTorch {name}": reason for name, reason in side.get("failed", {}).items()}
    for name, reason in reasons.items():
        print(f"not measured: {name}: {reason}")
    (args.work / "report.json").write_text(
        json.dumps({"rows": found, "failed": reasons, "benches": benches, "pytorch": side}, indent=2)
    )
    say("table", str(args.work / "report.json"))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="where everything is kept")
    parser.add_argument("--like", choices=("tiny", *llava.SIZES), default="llava-7b")
    parser.add_argument(
        "--backend", action="append", help="repeat; default tensorrt-rtx, then ort-cuda; ort-cpu for tiny"
    )
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--r", type=float, action="append", help="repeat (default .5 .75 .9)")
    parser.add_argument("--images", type=int, default=5, help="5 pictures of 576 tokens are LLaVA-NeXT's 2880")
    parser.add_argument("--tokens", type=int, help="of the whole prompt (default: 64 beside the pictures)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=540, help="seconds that one measurement of a pair may take")
    args = parser.parse_args(argv)
    args.backend = args.backend or (["ort-cpu"] if args.like == "tiny" else ["tensorrt-rtx", "ort-cuda"])
    args.ratios = [0.0, *(args.r or (0.5, 0.75, 0.9))]
    args.tokens = args.tokens or args.images * (16 if args.like == "tiny" else 576) + 64
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    run = dict(zip(STAGES, (make, export, engines, bench_bundles, pytorch, table), strict=True))
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run[stage](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
