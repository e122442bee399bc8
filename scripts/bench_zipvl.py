#!/usr/bin/env python3
"""Prefill, decode and caches of ZipVL beside dense and FastV, at lengths where attention starts to count.

Random decoders of 0.5 B widths on ONNX Runtime's CPU, everything interleaved in one run, ratios to dense of medians.
The longer the sequence, the fewer layers, to bound the time: FastV prunes all but k of them and ZipVL all, so FastV's
ratios are of these depths and not of 24 layers.

    scripts/bench_zipvl.py --sizes 576x24 2880x6 8000x3
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import bench_prefill as base
import numpy as np
import onnx_ir as ir
import torch

from vlmtrim.export import weights
from vlmtrim.export.families import llava
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.graphs import FastV
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.backends.ort import OrtBackend

TEXT_TOKENS = 64
ZipVL = load_method("zipvl")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["576x24", "2880x6", "8000x3"], help="visual tokens x layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode-rounds", type=int, default=15)
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    found = []
    for size in args.sizes:
        visual, layers = map(int, size.split("x"))
        with tempfile.TemporaryDirectory(prefix="vlmtrim-bench-") as scratch, torch.no_grad():
            found.append(measure(Path(scratch), visual, layers, args))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def methods(layers: int) -> dict[str, Any]:
    """What is compared, by name."""
    return {
        "dense": None,
        "fastv k=2 r=.5": FastV(k=2, r=0.5),
        "zipvl static .5": ZipVL(budgets=(0.5,) * layers),
        "zipvl tau .9 bound .5": ZipVL(tau=0.9, bound=0.5),
    }


def measure(folder: Path, visual: int, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """One length: print its table, return its numbers."""
    base.TEXT.num_hidden_layers, tokens = layers, visual + TEXT_TOKENS
    base.TEXT.layer_types = ["full_attention"] * layers
    base.TEXT.max_position_embeddings = 16384
    base.make_checkpoint(folder)
    config = base.llava.MODEL_CLASS.config_class.from_pretrained(folder)
    shape, tensors = llava.read_shape(config), weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched = weights.match_parameters(full, tensors)
    capacity = tokens + TEXT_TOKENS
    ir.save(base.traced(full, shape, matched, tensors, capacity), folder / "base.onnx")
    whole = CacheGroup(tuple(range(layers)), capacity, shape.kv_heads, shape.head_size)
    backend, decoders = OrtBackend("ort-cpu"), {}
    for index, (name, method) in enumerate(methods(layers).items()):
        graph = ir.load(folder / "base.onnx")
        groups = (whole,) if method is None else method.groups((whole,), visual)
        if method is not None:
            method(graph, visual_tokens=visual)
        decoders[name] = base.Decoder(folder, graph, groups, f"m{index}", backend)
    embeds = np.random.default_rng(0).normal(size=(1, tokens, shape.hidden)).astype(np.float32)
    places, nothing, token = np.arange(16, 16 + visual), np.zeros(0, np.int64), embeds[:, :1]
    prefill, _ = base.interleave({n: (lambda d=d: d.run(embeds, places)) for n, d in decoders.items()}, args.rounds)
    past = {n: [group.length(tokens, visual) for group in d.groups] for n, d in decoders.items()}
    decode, _ = base.interleave(
        {n: (lambda n=n, d=d: d.run(token, nothing, past=tokens, entries=past[n])) for n, d in decoders.items()},
        args.decode_rounds,
    )
    caches = {n: sum(group.nbytes(1, "float32") for group in d.groups) for n, d in decoders.items()}
    print(
        f"{visual} visual of {tokens} tokens, {layers} layers: {prefill['dense']:.2f} s, {decode['dense'] * 1e3:.1f} ms"
    )
    print(f"{'':22} {'prefill':>8} {'decode':>8} {'caches':>8}")
    for name in decoders:
        ratios = [numbers[name] / numbers["dense"] for numbers in (prefill, decode, caches)]
        print(f"{name:22} " + " ".join(f"{ratio:8.3f}" for ratio in ratios), flush=True)
    return {"visual": visual, "layers": layers, "prefill": prefill, "decode": decode, "caches": caches}


if __name__ == "__main__":
    main()
