#!/usr/bin/env python3
"""What tracing takes where torch.onnx is spared its decompositions and where not, interleaved, by processor time.

Graphs of a published LLaVA, from its config alone; no weights are needed.

    scripts/bench_trace.py --like llava-7b --rounds 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import torch
from transformers import LlavaConfig

from vlmtrim.export.families import llava
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup


def counted(plan: trace.Plan) -> tuple[int, float]:
    """Nodes of a trace, and the processor seconds it took."""
    start = time.process_time()
    return len(trace.trace(plan).graph), time.process_time() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--like", choices=sorted(llava.SIZES), default="llava-7b")
    p.add_argument("--rounds", type=int, default=2)
    args = p.parse_args()
    config = LlavaConfig.from_dict(llava.published(args.like))
    shape = llava.read_shape(config)
    full = trace.build_without_memory(llava.MODEL_CLASS, config, torch.float16, IMPLEMENTATION)
    group = CacheGroup(tuple(range(shape.layers)), 2048, shape.kv_heads, shape.head_size)
    sizes = {"hidden": shape.hidden, "vocabulary": shape.vocabulary}
    plans = llava.plans(
        full, shape, torch.float16, decoder_spec(dtype="float16", groups=(group,), selects=False, **sizes)
    )
    for plan in plans:
        spared, plain = [], []
        for _ in range(args.rounds):
            spared.append(counted(plan))
            with mock.patch.object(trace, "settle", lambda program: program):
                plain.append(counted(plan))
        assert {nodes for nodes, _ in spared} == {nodes for nodes, _ in plain}, "the graphs differ"
        ours, theirs = (statistics.median(taken for _, taken in row) for row in (spared, plain))
        print(f"{plan.spec.file}: {spared[0][0]} nodes, {ours:.1f} s to {theirs:.1f} s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
