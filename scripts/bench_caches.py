#!/usr/bin/env python3
"""What a cut cache is worth in a decode step, and what cutting it costs, on ONNX Runtime's CPU.

A random decoder of 0.5 B widths, everything interleaved in one run, medians; prefill and decode by processor time.
Decode steps behind so many entries are those of any policy that leaves so many; rows are what a prefill returns for
policies; score, policy and compact are a policy's graphs for all layers.

    scripts/bench_caches.py --sizes 2880x12 8000x6
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
from vlmtrim.graphs.boundary import cache_specs, compacts, decoder_spec
from vlmtrim.graphs.caches import load_policy
from vlmtrim.graphs.caching import cache_graphs
from vlmtrim.graphs.contract import CacheGroup, GraphSpec
from vlmtrim.graphs.keeping import CANDIDATE, STAYS, CachePolicy
from vlmtrim.graphs.passes.score_queries import score_queries
from vlmtrim.runtime.backends.ort import OrtBackend

TEXT_TOKENS = 64
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
ROWS = (0, 1, 8, 32, 64)
POLICIES = ("aircache", "snapkv", "keydiff")


class Scored(base.Decoder):
    """A decoder that returns queries of the rows that it is told."""

    def __init__(self, folder: Path, model: ir.Model, group: CacheGroup, heads: int, backend: OrtBackend):
        self.groups, self.backend, self.rows, self.selects = (group,), backend, 0, False
        ir.save(model, folder / "scored.onnx")
        sizes = {"hidden": base.TEXT.hidden_size, "vocabulary": base.TEXT.vocab_size, "query_heads": heads}
        spec = decoder_spec(dtype="float32", groups=self.groups, selects=False, **sizes)
        self.graph = backend._open(folder, GraphSpec("scored.onnx", spec.inputs, spec.outputs), {})
        caches = [tensor for tensor in spec.inputs if tensor.name.startswith("past_key_values")]
        shape = (1, group.kv_heads, group.capacity, group.head_size)
        self.caches = {tensor.name: backend.zeros(shape, "float32") for tensor in caches}
        self.graph.bind_caches(self.caches)

    def step(self, embeds: np.ndarray, entries: int, rows: int) -> Any:
        """One step behind ``entries``, whose last ``rows`` tokens score."""
        tokens = embeds.shape[1]
        feeds = {
            "inputs_embeds": embeds,
            "position_ids": entries + np.arange(tokens)[None],
            "last_index": np.array([tokens - 1]),
            "score_rows": np.arange(tokens - rows, tokens)[None],
            "write_indices.0": np.array([entries]),
            "key_positions.0": np.arange(entries + tokens),
        }
        return self.backend.to_host(self.graph.run(feeds)["logits"])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2880x12", "8000x6"], help="visual tokens x layers")
    parser.add_argument("--key-heads", type=int, default=14, help="of 14 query heads")
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


def measure(folder: Path, visual: int, layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """One length: print its tables, return its numbers."""
    base.TEXT.num_hidden_layers, tokens = layers, visual + TEXT_TOKENS
    base.TEXT.num_key_value_heads = args.key_heads
    base.TEXT.layer_types = ["full_attention"] * layers
    base.TEXT.max_position_embeddings = 16384
    base.make_checkpoint(folder)
    config = llava.MODEL_CLASS.config_class.from_pretrained(folder)
    shape, tensors = llava.read_shape(config), weights.read_checkpoint(folder)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float32, IMPLEMENTATION)
    matched, capacity = weights.match_parameters(full, tensors), tokens + TEXT_TOKENS
    group = CacheGroup(tuple(range(layers)), capacity, shape.kv_heads, shape.head_size)
    backend = OrtBackend("ort-cpu")
    plain = base.Decoder(folder, base.traced(full, shape, matched, tensors, capacity), (group,), "plain", backend)
    graph = base.traced(full, shape, matched, tensors, capacity, lambda model: score_queries(base.last_row(model)))
    heads = config.text_config.num_attention_heads
    scored = Scored(folder, graph, group, heads, backend)
    random = np.random.default_rng(0)
    embeds = random.normal(size=(1, tokens, shape.hidden)).astype(np.float32)
    token, nothing = embeds[:, :1], np.zeros(0, np.int64)
    held = {share: TEXT_TOKENS + round(visual * share) for share in SHARES}
    jobs: dict[str, Any] = {"no policy": lambda: plain.run(token, nothing, past=tokens, entries=[tokens])}
    jobs |= {f"share {s:g}": (lambda n=n: scored.step(token, n, 0)) for s, n in held.items()}
    jobs["share 1, its row scores"] = lambda: scored.step(token, tokens, 1)
    _, decode = base.interleave(jobs, args.decode_rounds)
    prompts: dict[str, Any] = {"no policy": lambda: plain.run(embeds, nothing)}
    prompts |= {f"{rows} rows": (lambda rows=rows: scored.step(embeds, 0, rows)) for rows in ROWS}
    _, prefill = base.interleave(prompts, args.rounds)
    graphs = {name: cut_jobs(folder, name, scored, heads, tokens, visual, random) for name in POLICIES}
    cuts, _ = base.interleave(
        {f"{n} {g}": job for n, of in graphs.items() for g, job in of.items()}, args.decode_rounds
    )
    print(f"{visual} visual of {tokens} tokens, {layers} layers, {shape.kv_heads} key heads of {heads}")
    for title, numbers in (("prefill", prefill), ("decode step", decode)):
        first = numbers["no policy"]
        said = ", ".join(f"{name} {found / first:.3f}" for name, found in numbers.items())
        print(f"{title}: {first * 1e3:.1f} ms; {said}")
    dense = plain.groups[0]
    sizes = {f"share {s:g}": 2 * layers * dense.kv_heads * n * dense.head_size * 4 for s, n in held.items()}
    print("filled caches: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
    print("of all layers, ms: " + ", ".join(f"{name} {found * 1e3:.1f}" for name, found in cuts.items()), flush=True)
    return {"visual": visual, "layers": layers, "prefill": prefill, "decode": decode, "cuts": cuts, "bytes": sizes}


def cut_jobs(
    folder: Path, name: str, decoder: Scored, heads: int, tokens: int, visual: int, random: np.random.Generator
) -> dict[str, Any]:
    """A policy's three graphs, each for all layers."""
    group, policy = decoder.groups[0], load_policy(name)()
    record = CachePolicy(policy.describe(), policy.rows, policy.count, 0.25, compacts([group]))
    sizes = policy.sets(group.kv_heads), policy.maps(group.kv_heads)
    specs = cache_specs(record, [group], "float32", heads, *sizes, policy.merges)
    opened = {}
    for graph, model in cache_graphs(policy, specs).items():
        spec = GraphSpec(f"{name}-{specs[graph].file}", specs[graph].inputs, specs[graph].outputs)
        ir.save(model, folder / spec.file)
        opened[graph] = decoder.backend._open(folder, spec, {})
    layers, count = len(group.layers), min(policy.count, TEXT_TOKENS - 16)
    kinds = np.full((layers, 1, tokens), STAYS)
    kinds[:, :, 16 : 16 + visual] = CANDIDATE
    queries = random.normal(size=(1, heads, count, group.head_size)).astype(np.float32)
    scores = random.random((layers, 1, sizes[1], tokens)).astype(np.float32)
    kept = TEXT_TOKENS + visual // 4
    order = np.sort(random.permuted(np.tile(np.arange(tokens), (1, sizes[0], 1)), axis=2)[:, :, :kept], axis=2)

    def score() -> None:
        feeds = {"score_queries": queries, "row_slots": np.arange(tokens - count, tokens)[None], "key_kinds": kinds[0]}
        for layer in range(layers):
            cache = {"past_key_values.key": decoder.caches[f"past_key_values.{layer}.key"]}
            opened["score"].run({**feeds, **cache})

    def choose() -> None:
        share = np.array(0.25, dtype=np.float32)
        opened["policy"].run({"key_scores": scores, "key_kinds": kinds, "share": share})

    def compact() -> None:
        for layer in range(layers):
            pairs = ((kind, decoder.caches[f"past_key_values.{layer}.{kind}"]) for kind in ("key", "value"))
            opened["compact-0"].bind_caches({f"past_key_values.{kind}": cache for kind, cache in pairs})
            opened["compact-0"].run({"order": order})

    return {"score": score, "policy": choose, "compact": compact}


if __name__ == "__main__":
    main()
