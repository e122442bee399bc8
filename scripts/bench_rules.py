#!/usr/bin/env python3
"""What each score costs in the graph: the time of what it inserts, as a share of a prefill of the 0.5 B decoder.

ONNX Runtime's own profile on the CPU, median of the runs. Of the longer prefill fewer layers are run, to bound the
time, and the share is of all 24: a layer takes as long as any other. ``fastervlm`` costs one row of the vision tower.

    scripts/bench_rules.py --sizes 24x24x24 60x48x6
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
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
from vlmtrim.graphs import FastV
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.rules import VISION, load_rule, rule_names

TEXT_TOKENS, LAYERS, K = 64, 24, 2


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["24x24x24", "60x48x6"], help="rows x columns of tokens x layers")
    parser.add_argument("--r", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for size in args.sizes:
        rows, columns, layers = map(int, size.split("x"))
        with tempfile.TemporaryDirectory(prefix="vlmtrim-bench-") as scratch, torch.no_grad():
            measure(Path(scratch), (rows, columns), layers, args)


def measure(folder: Path, grid: tuple[int, int], layers: int, args: argparse.Namespace) -> None:
    """One size: print its table."""
    visual = grid[0] * grid[1]
    tokens = visual + TEXT_TOKENS
    base.TEXT.num_hidden_layers, base.TEXT.layer_types = layers, ["full_attention"] * layers
    base.make_checkpoint(folder)
    config = base.llava.MODEL_CLASS.config_class.from_pretrained(folder)
    shape, tensors = llava.read_shape(config), weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched = weights.match_parameters(full, tensors)
    ir.save(base.traced(full, shape, matched, tensors, tokens), folder / "base.onnx")
    group = CacheGroup(tuple(range(layers)), tokens, shape.kv_heads, shape.head_size)
    embeds = np.random.default_rng(0).normal(size=(1, tokens, shape.hidden)).astype(np.float32)
    dense = median(profile(folder, "base", (group,), embeds, visual, args.rounds)[1]) * LAYERS / layers
    print(f"{visual} visual of {tokens} tokens: a dense prefill of {LAYERS} layers takes {dense / 1e6:.2f} s")
    for rule in rule_names():
        if VISION in load_rule(rule).NEEDS:
            continue
        cells = []
        for r in args.r:
            method, graph = FastV(K, r, score=rule), ir.load(folder / "base.onnx")
            ir.save(method(graph, visual_tokens=visual, grid=grid), folder / "pruned.onnx")
            own, _ = profile(folder, "pruned", method.groups((group,), visual), embeds, visual, args.rounds)
            cells.append(f"r = {r:g}: {median(own) / 1e3:8.1f} ms {100 * median(own) / dense:6.2f} %")
        print(f"    {rule:14} {'   '.join(cells)}", flush=True)


def profile(
    folder: Path, name: str, groups: tuple[CacheGroup, ...], embeds: np.ndarray, visual: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Microseconds of (what was inserted, everything), run by run; what a Loop runs is counted as the Loop."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / f"profile-{name}")
    options.log_severity_level = 3  # caches are copied here on purpose
    session = ort.InferenceSession(folder / f"{name}.onnx", options)
    feeds: dict[str, Any] = {
        value.name: np.zeros([1 if isinstance(dim, str) else dim for dim in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    tokens = embeds.shape[1]
    feeds |= {"inputs_embeds": embeds, "position_ids": np.arange(tokens)[None], "last_index": np.array([tokens - 1])}
    feeds["visual_positions"] = np.arange(16, 16 + visual)[None]
    for index, group in enumerate(groups):
        feeds[f"write_indices.{index}"] = np.array([0])
        feeds[f"key_positions.{index}"] = np.arange(group.length(tokens, visual))
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    for _ in range(rounds + 1):
        session.run(["logits"], feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    starts = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    found: tuple[list[float], list[float]] = ([], [])
    for begin, end in starts[1:]:  # the first one warms up
        inside = [
            event
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and begin <= event["ts"] < end
        ]
        inside = [event for event in inside if not event["name"].startswith("select/pick/")]
        own = [event for event in inside if event["name"].startswith("select/") or ".own" in event["name"]]
        found[0].append(sum(event["dur"] for event in own))
        found[1].append(sum(event["dur"] for event in inside))
    return found


if __name__ == "__main__":
    main()
