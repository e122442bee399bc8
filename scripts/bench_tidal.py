#!/usr/bin/env python3
"""Decode steps of TidalDecode beside dense ones behind long caches, and what its gathers cost a prefill.

Random decoders of 0.5 B widths and a small vocabulary (0.36 B) on ONNX Runtime's CPU, with as many key heads as query
heads (14) and with 2; everything of a head count is interleaved in one run on one set of random caches. Ratios to dense
of medians, of wall time and of CPU time.

    scripts/bench_tidal.py --lengths 3000 8000 16000 --entries 512 1024
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_prefill as base
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from vlmtrim.export import weights
from vlmtrim.export.families import llava
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.backends.ort import OrtBackend, on_host

Tidal = load_method("tidal")
Times = dict[str, tuple[float, float]]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[3000, 8000, 16000], help="cache entries")
    parser.add_argument("--entries", nargs="+", type=int, default=[512, 1024], help="that later layers attend to")
    parser.add_argument("--key-heads", nargs="+", type=int, default=[14, 2])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prefill; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    found = {}
    for heads in args.key_heads:
        with tempfile.TemporaryDirectory(prefix="vlmtrim-bench-") as scratch, torch.no_grad():
            found[heads] = measure(Path(scratch), heads, args)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def measure(folder: Path, heads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One number of key heads: print its table, return its numbers."""
    text = base.TEXT
    text.num_hidden_layers, text.num_key_value_heads, text.vocab_size = args.layers, heads, 4096
    text.layer_types = ["full_attention"] * args.layers
    text.max_position_embeddings = 32768
    base.make_checkpoint(folder)
    config = llava.MODEL_CLASS.config_class.from_pretrained(folder)
    shape, tensors = llava.read_shape(config), weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched = weights.match_parameters(full, tensors)
    capacity = max(args.lengths) + 64
    ir.save(base.traced(full, shape, matched, tensors, capacity), folder / "base.onnx")
    group = CacheGroup(tuple(range(args.layers)), capacity, shape.kv_heads, shape.head_size)
    backend, decoders, random_ = OrtBackend("ort-cpu"), {}, np.random.default_rng(0)
    caches: dict[str, Any] = {}
    for method in (None, *(Tidal(entries) for entries in args.entries)):
        graph = ir.load(folder / "base.onnx")
        name = "dense" if method is None else f"tidal {method.entries}"
        graph = graph if method is None else method(graph)
        decoders[name] = base.Decoder(folder, graph, (group,), name.replace(" ", "-"), backend)
        caches = caches or random_caches(decoders[name], random_)
        decoders[name].graph.bind_caches(caches)
    embeds = random_.normal(size=(1, max(1, args.prefill), shape.hidden)).astype(np.float32)
    nothing, results = np.zeros(0, np.int64), {}
    print(f"{heads} key heads, {args.layers} layers; ratio of wall / of CPU time to dense")
    for length in args.lengths:
        steps = {n: (lambda d=d, past=length - 1: d.run(embeds[:, :1], nothing, past)) for n, d in decoders.items()}
        results[length] = report(f"step behind {length}", interleaved(steps, args.rounds))
    if args.prefill:
        prefill = {n: (lambda d=d: d.run(embeds, nothing)) for n, d in decoders.items()}
        results["prefill"] = report(f"prefill of {args.prefill}", interleaved(prefill, max(3, args.rounds // 5)))
    return results


def random_caches(decoder: base.Decoder, random_: np.random.Generator) -> dict[str, Any]:
    """Filled caches, for all decoders."""
    sizes = {tensor.name: tensor.shape for tensor in decoder.graph.spec.inputs if tensor.name.startswith("past")}
    shapes = {name: [size if isinstance(size, int) else 1 for size in shape] for name, shape in sizes.items()}
    return {name: on_host(ort, random_.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()}


def interleaved(jobs: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Median (wall, CPU) seconds of each job after a warm-up round, every round in another order."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    shuffle = random.Random(0)
    for index in range(rounds + 1):
        for name in shuffle.sample(list(jobs), len(jobs)):
            wall, cpu = time.perf_counter(), time.process_time()
            jobs[name]()
            if index:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        print(f"round {index} of {rounds}", file=sys.stderr, flush=True)
    return {n: (statistics.median(w for w, _ in v), statistics.median(c for _, c in v)) for n, v in found.items()}


def report(what: str, times: Times) -> Times:
    """Print a line of ratios."""
    wall, cpu = times["dense"]
    ratios = [f"{name} {w / wall:.3f} / {c / cpu:.3f}" for name, (w, c) in times.items() if name != "dense"]
    print(f"  {what:18} dense {wall * 1e3:8.1f} ms   {'   '.join(ratios)}", flush=True)
    return times


if __name__ == "__main__":
    main()
