#!/usr/bin/env python3
"""Prefill and decode of a random decoder of 0.5 B parameters on ONNX Runtime's CPU, dense against FastV.

Everything is interleaved in one run, so ratios hold on a noisy machine; PyTorch does the same work beside it.
Prints, per ratio: time, speed-up, the speed-up that FLOPs predict, and their quotient; then the cost of the selection
itself (r = 0 against no pass), and one decode step at length 700 in capacities of 1024 and 4096.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from transformers import Qwen2Config

from vlmtrim.export import weights
from vlmtrim.export.families import llava
from vlmtrim.export.flops import decoder_macs, prefill_macs
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.export.tracing.text_decoder import Shape
from vlmtrim.graphs import FastV
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup, GraphSpec, kept_count
from vlmtrim.graphs.passes.last_row import last_row
from vlmtrim.runtime.backends.ort import OrtBackend

TEXT = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
K = 2


def make_checkpoint(folder: Path) -> Any:
    """Random float32 LLaVA around the text model; returns the transformers model."""
    torch.manual_seed(0)
    config = llava.tiny_config(text="qwen2")
    config.text_config = TEXT
    model = llava.MODEL_CLASS(config).eval()
    model.save_pretrained(folder, max_shard_size="20GB")
    return model


def predicted_speedup(tokens: int, visual: int, r: float) -> float:
    """Dense multiply-adds over pruned ones."""
    return prefill_macs(TEXT, tokens, visual, K, 0) / prefill_macs(TEXT, tokens, visual, K, r)


def last_layer_gain(tokens: int) -> float:
    """Multiply-adds of a dense prefill whose last layer runs on all tokens, over those of one whose last does not."""
    macs, less = decoder_macs(TEXT), prefill_macs(TEXT, tokens, 0, 0, 0)
    assert macs is not None
    return (less + macs.spared(tokens, tokens)) / less


class Decoder:
    """One ONNX decoder on ONNX Runtime with caches bound in place."""

    def __init__(self, folder: Path, model: ir.Model, groups: tuple[CacheGroup, ...], name: str, backend: OrtBackend):
        self.groups, self.backend = groups, backend
        self.selects = any(value.name == "visual_positions" for value in model.graph.inputs)
        ir.save(model, folder / f"{name}.onnx")
        spec = decoder_spec(
            dtype="float32",
            hidden=TEXT.hidden_size,
            vocabulary=TEXT.vocab_size,
            groups=groups,
            selects=self.selects,
        )
        self.graph = backend._open(folder, GraphSpec(f"{name}.onnx", spec.inputs, spec.outputs), {})
        caches = {
            tensor.name: backend.zeros(tuple(d if isinstance(d, int) else 1 for d in tensor.shape), "float32")
            for tensor in spec.inputs
            if tensor.name.startswith("past_key_values")
        }
        self.graph.bind_caches(caches)

    def run(
        self, embeds: np.ndarray, visual: np.ndarray, past: int = 0, entries: Sequence[int] | None = None
    ) -> np.ndarray:
        """One step behind ``past`` tokens, which are ``entries`` in the caches of each group; returns logits."""
        tokens = embeds.shape[1]
        feeds: dict[str, Any] = {
            "inputs_embeds": embeds,
            "position_ids": past + np.arange(tokens)[None],
            "last_index": np.array([tokens - 1]),
        }
        if self.selects:
            feeds["visual_positions"] = visual[None]
        for index, group in enumerate(self.groups):
            held = past if entries is None else entries[index]
            feeds[f"write_indices.{index}"] = np.array([held])
            feeds[f"key_positions.{index}"] = np.arange(held + group.length(tokens, len(visual)))
        return self.backend.to_host(self.graph.run(feeds)["logits"])


def traced(
    full: Any, shape: Shape, matched: Any, stored: Any, capacity: int, rewrite: Callable[[ir.Model], Any] = last_row
) -> ir.Model:
    """The dense decoder with weights bound, as an export has it: its last layer runs on each row's last token."""
    group = CacheGroup(tuple(range(shape.layers)), capacity, shape.kv_heads, shape.head_size)
    spec = decoder_spec(
        dtype="float32", hidden=shape.hidden, vocabulary=shape.vocabulary, groups=(group,), selects=False
    )
    model = trace.trace(llava.plans(full, shape, torch.float32, spec)[2])
    rewrite(model)
    weights.bind(model, matched, stored)
    return model


def torch_prefill(model: Any, embeds: torch.Tensor, visual: torch.Tensor, implementation: str, r: float | None) -> Any:
    """The same prefill in PyTorch. With ``r``, layer K-1 runs eager for its scores, as FastV's users do."""
    text, head = model.model.language_model, model.lm_head
    positions = torch.arange(embeds.shape[1])[None]
    hidden, seen = embeds, []
    for index, layer in enumerate(text.layers):
        scoring = r is not None and index == K - 1
        text.config._attn_implementation = "eager" if scoring else implementation
        if r is not None and index == K:
            row = seen[0][0].mean(0)[-1]
            best = visual[row[visual].topk(kept_count(len(visual), r)).indices]
            keep = torch.ones(hidden.shape[1], dtype=torch.bool)
            keep[visual] = False
            keep[best] = True
            hidden, positions = hidden[:, keep], positions[:, keep]
        tokens = hidden.shape[1]
        mask = None
        if text.config._attn_implementation == "eager":
            mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
        handle = layer.self_attn.register_forward_hook(lambda _, __, out: seen.append(out[1])) if scoring else None
        output = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=text.rotary_emb(hidden, positions),
        )
        hidden = output[0] if isinstance(output, tuple) else output
        if handle is not None:
            handle.remove()
    return head(text.norm(hidden[:, -1:]))[0, 0]


def interleave(jobs: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each job after a warm-up round, and of all threads' work in them; every round in another order,
    so that none always follows the same neighbour (PyTorch's threads spin on for a while after its work)."""
    clocks = (time.perf_counter, time.process_time)
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in jobs}
    shuffle = random.Random(0)
    for index in range(rounds + 1):
        for name in shuffle.sample(list(jobs), len(jobs)):
            time.sleep(0.3)
            start = [clock() for clock in clocks]
            jobs[name]()
            if index:
                times[name].append(tuple(clock() - at for clock, at in zip(clocks, start, strict=True)))
        print(f"round {index} of {rounds}", file=sys.stderr, flush=True)
    wall, worked = ({n: statistics.median(t[i] for t in values) for n, values in times.items()} for i in range(2))
    return wall, worked


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--visual", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode-rounds", type=int, default=30)
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch columns out")
    parser.add_argument("--json", default=None, help="also write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmtrim-bench-") as scratch, torch.no_grad():
        results = bench(Path(scratch), args)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def bench(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what is printed."""
    model = make_checkpoint(folder)
    config, shape = model.config, llava.read_shape(model.config)
    tensors = weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched = weights.match_parameters(full, tensors)
    dense = traced(full, shape, matched, tensors, 1024)
    ir.save(dense, folder / "base.onnx")
    backend = OrtBackend("ort-cpu")
    embeds = np.random.default_rng(0).normal(size=(1, args.tokens, shape.hidden)).astype(np.float32)
    visual = np.arange(16, 16 + args.visual)
    everything = CacheGroup(tuple(range(shape.layers)), 1024, shape.kv_heads, shape.head_size)
    decoders = {"dense": Decoder(folder, dense, (everything,), "dense", backend)}
    plain = traced(full, shape, matched, tensors, 1024, lambda model: model)
    decoders["all rows"] = Decoder(folder, plain, (everything,), "plain", backend)
    wide = traced(full, shape, matched, tensors, 4096)  # before PyTorch's runs change the config that it shares
    for r in (0.0, 0.5, 0.75, 0.9):
        pruned = FastV(k=K, r=r)(ir.load(folder / "base.onnx"))
        head, tail = tuple(range(K)), tuple(range(K, shape.layers))
        groups = tuple(
            CacheGroup(layers, 1024, shape.kv_heads, shape.head_size, removed)
            for layers, removed in ((head, 0.0), (tail, r))
        )
        decoders[f"r={r:g}"] = Decoder(folder, pruned, groups, f"r{r:g}", backend)
    jobs: dict[str, Callable[[], Any]] = {
        name: (lambda d=decoder: d.run(embeds, visual)) for name, decoder in decoders.items()
    }
    if not args.no_torch:
        x, v = torch.from_numpy(embeds), torch.from_numpy(visual)
        for implementation in ("eager", "sdpa"):
            for r in (None, 0.5, 0.75, 0.9):
                name = f"torch {implementation} {'dense' if r is None else f'r={r:g}'}"
                jobs[name] = lambda i=implementation, r=r: torch_prefill(model, x, v, i, r)
    times, worked = interleave(jobs, args.rounds)
    results = report_prefill(times, args)
    print("\nthe same by the processors' time of all threads, which other work on the machine does not stretch")
    results["by_cpu"] = report_prefill(worked, args)
    share = selection_share(decoders["r=0"], folder, embeds, visual)
    print(f"in ONNX Runtime's own profile its nodes take {100 * share:.2f} % of a prefill")
    results["selection_share"] = share
    decoders = {"1024": decoders["dense"]}
    decoders["4096"] = Decoder(
        folder,
        wide,
        (CacheGroup(everything.layers, 4096, everything.kv_heads, everything.head_size),),
        "wide",
        backend,
    )
    token, nothing = embeds[:, :1], np.zeros(0, dtype=np.int64)
    steps, _ = interleave(
        {name: (lambda d=decoder: d.run(token, nothing, past=699)) for name, decoder in decoders.items()},
        args.decode_rounds,
    )
    ratio = steps["4096"] / steps["1024"]
    print(
        f"\ndecode step at length 700: capacity 1024 {steps['1024'] * 1e3:.1f} ms, 4096 {steps['4096'] * 1e3:.1f} ms,"
    )
    print(f"ratio {ratio:.3f} (goal <= 1.15)")
    return {**results, "decode": {**steps, "ratio": ratio}}


def selection_share(decoder: Decoder, folder: Path, embeds: np.ndarray, visual: np.ndarray) -> float:
    """Share of a prefill's time that ONNX Runtime's profiler books on the nodes that the pass inserted."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(folder / decoder.graph.spec.file, options)
    group = decoder.groups[0]
    feeds: dict[str, np.ndarray] = {
        value.name: np.zeros((1, group.kv_heads, group.capacity, group.head_size), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    feeds |= {
        "inputs_embeds": embeds,
        "position_ids": np.arange(embeds.shape[1])[None],
        "last_index": np.array([embeds.shape[1] - 1]),
        "visual_positions": visual[None],
    }
    for index in range(len(decoder.groups)):
        feeds[f"write_indices.{index}"] = np.array([0])
        feeds[f"key_positions.{index}"] = np.arange(embeds.shape[1])
    for _ in range(2):
        session.run(["logits"], feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    inserted = sum(event["dur"] for event in kernels if event["name"].startswith("select/"))
    return inserted / sum(event["dur"] for event in kernels)


def report_prefill(times: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Print the prefill tables."""
    dense = times["dense"]
    print(f"prefill of {args.tokens} tokens, {args.visual} visual, k={K}, float32, {torch.get_num_threads()} threads")
    print(f"{'':8} {'seconds':>8} {'speed-up':>9} {'by FLOPs':>9} {'quotient':>9} {'vs eager':>9} {'vs SDPA':>9}")
    rows: dict[str, Any] = {}
    for name in ("dense", "r=0", "r=0.5", "r=0.75", "r=0.9"):
        r = 0.0 if name == "dense" else float(name[2:])
        predicted = predicted_speedup(args.tokens, args.visual, r)
        speedup = dense / times[name]
        label = "dense" if r == 0 else name
        against = [times.get(f"torch {i} {label}", float("nan")) / times[name] for i in ("eager", "sdpa")]
        rows[name] = {
            "seconds": times[name],
            "speedup": speedup,
            "predicted": predicted,
            "quotient": speedup / predicted,
            "faster_than_torch_eager": against[0],
            "faster_than_torch_sdpa": against[1],
        }
        print(
            f"{name:8} {times[name]:8.3f} {speedup:9.3f} {predicted:9.3f} {speedup / predicted:9.3f} "
            f"{against[0]:9.2f} {against[1]:9.2f}"
        )
    saved = times["all rows"] / dense
    print(f"a last layer on all tokens takes {saved:.3f} times as long, by FLOPs {last_layer_gain(args.tokens):.3f}")
    cost = times["r=0"] / dense - 1
    print(f"\nthe selection itself (r=0 against no pass): {100 * cost:+.2f} % of prefill (goal <= 1 %)")
    return {"prefill": rows, "selection_cost": cost, "all_rows": saved}


if __name__ == "__main__":
    main()
