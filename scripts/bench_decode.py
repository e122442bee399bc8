#!/usr/bin/env python3
"""What selection costs in a decode step, where it selects nothing: each method against dense at the same cache lengths.

A random decoder of 0.5 B widths on ONNX Runtime's CPU, all caches as long as dense's, steps interleaved in one run;
wall time and processor time of all threads, medians, as ratios to dense. "dense again" is the same graph once more:
what it differs from 1 by is noise. Then the nodes that ONNX Runtime runs, and the layers of the network that
TensorRT-RTX parses of a float16 decoder (its engine inspector needs a GPU, so engines are told by their size).

    scripts/bench_decode.py --layers 12 --rounds 60
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
import onnxruntime as ort
import torch

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import pipeline, weights
from vlmtrim.export.families import llava
from vlmtrim.export.job import Job
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.export.weights import tiny
from vlmtrim.graphs import FastV
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.methods import load_method
from vlmtrim.runtime.backends.ort import OrtBackend
from vlmtrim.runtime.engines import build, import_library

METHODS: dict[str, Any] = {
    "dense": None,
    "dense again": None,
    "fastv k=2": FastV(k=2, r=0.5),
    "fastv k=2 cells": FastV(k=2, r=0.5, score="cells"),
    "pyramid": load_method("pyramid")(),
    "zipvl": load_method("zipvl")(tau=0.9, bound=0.5),
}
GRID = (24, 24)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="a decoder takes 60 MB a layer, and 6 are held")
    parser.add_argument("--past", type=int, default=640, help="entries of every cache")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmtrim-bench-") as scratch, torch.no_grad():
        counted = parsed_layers(Path(scratch))
        wall, worked, nodes = steps(Path(scratch), args)
    print(f"decode step behind {args.past} entries, {args.layers} layers, float32: dense {1e3 * wall['dense']:.1f} ms")
    print(f"{'':18} {'wall':>7} {'by CPU':>7} {'nodes':>7} {'layers of 4':>12} {'engine, MB':>11}")
    for name in METHODS:
        layers, size = counted[name]
        ratios = wall[name] / wall["dense"], worked[name] / worked["dense"]
        print(f"{name:18} {ratios[0]:7.3f} {ratios[1]:7.3f} {nodes[name]:7} {layers:12} {size / 1e6:11.1f}")
    if args.json:
        found = {"wall": wall, "cpu": worked, "nodes": nodes, "parsed": counted}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


def steps(folder: Path, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Median seconds of a decode step, on the clock and of all threads, and nodes of the optimised graph, by method."""
    base.TEXT.num_hidden_layers, base.TEXT.vocab_size = args.layers, 32_000
    base.TEXT.layer_types = ["full_attention"] * args.layers
    base.make_checkpoint(folder)
    config = llava.MODEL_CLASS.config_class.from_pretrained(folder)
    shape, tensors = llava.read_shape(config), weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched = weights.match_parameters(full, tensors)
    ir.save(base.traced(full, shape, matched, tensors, args.past + 64), folder / "base.onnx")
    whole = CacheGroup(tuple(range(shape.layers)), args.past + 64, shape.kv_heads, shape.head_size)
    backend, decoders, nodes = OrtBackend("ort-cpu"), {}, {}
    for index, (name, method) in enumerate(METHODS.items()):
        graph, groups = ir.load(folder / "base.onnx"), (whole,)
        if method is not None:  # no visual tokens are planned for, so no cache is smaller than dense's
            groups = method.groups((whole,), 0)
            method(graph, visual_tokens=0, grid=GRID)
        decoders[name] = base.Decoder(folder, graph, groups, f"m{index}", backend)
        nodes[name] = optimised_nodes(folder / f"m{index}.onnx")
    token, nothing = np.random.default_rng(0).normal(size=(1, 1, shape.hidden)).astype(np.float32), np.zeros(0, int)
    jobs = {
        name: (lambda d=decoder: d.run(token, nothing, past=args.past, entries=[args.past] * len(d.groups)))
        for name, decoder in decoders.items()
    }
    return *base.interleave(jobs, args.rounds), nodes


def optimised_nodes(file: Path) -> int:
    """How many nodes ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(file.with_suffix(".optimised"))
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{file.stem}.data")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    count = len(ir.load(file.with_suffix(".optimised")).graph)
    (file.parent / f"{file.stem}.data").unlink()
    return count


def parsed_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """(layers of the parsed network, bytes of the engine) of a tiny float16 decoder of 4 layers, by method."""
    trt = import_library("tensorrt-rtx")
    source = tiny.write_checkpoint(checkpoints.load_family("llava"), folder / "tiny")
    found: dict[str, tuple[int, int]] = {}
    traces: dict[str, Any] = {}
    for index, (name, method) in enumerate(METHODS.items()):
        job = Job(str(source), str(folder / f"t{index}"), method, "float16", 512, engine="tensorrt-rtx")
        bundle = pipeline.export(job, source, traces)
        logger = build.make_logger(trt, [])
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(bundle / "decoder.onnx"))
        found[name] = network.num_layers, (bundle / "decoder.engine").stat().st_size
    return found


if __name__ == "__main__":
    main()
