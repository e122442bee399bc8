"""What it costs to move a window to the front of a layer's caches, at the sizes of Gemma 3 (ONNX Runtime, CPU).

In turn: the move by whole entries (``shift``), the same through an index for every number, as cache policies compact,
and numpy's copy of as many bytes, in float32. Medians of CPU time, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlmtrim.export.families import gemma3
from vlmtrim.graphs.boundary import shift_specs
from vlmtrim.graphs.contract import CacheGroup, GraphSpec, TensorSpec
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.shifting import shift_graphs
from vlmtrim.runtime.backends.base import Graph
from vlmtrim.runtime.select_backend import make_backend

WINDOW = 1024


def main() -> None:
    """Print one line a model."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--max-input-len", type=int, default=2048)
    p.add_argument("--rounds", type=int, default=31)
    args = p.parse_args()
    for name, (_, _, layers, _, kv_heads, size, _) in gemma3.SIZES.items():
        group = CacheGroup((0,), WINDOW + args.max_input_len, kv_heads, size, window=WINDOW)
        near = sum((layer + 1) % 6 != 0 for layer in range(layers))
        with tempfile.TemporaryDirectory() as folder:
            shift, compact = opened(Path(folder), group)
            times = interleaved([shift, compact, copying(group)], args.rounds)
        size = group.read_bytes(WINDOW, "float32") / 1e6
        moved, numbers, copied = (f"{seconds * 1e3:.2f}" for seconds in times)
        each = near * times[0] * 1e3 / args.max_input_len
        print(
            f"{name}: {near} layers of {layers}; one moves {size:.1f} MB in {moved} ms, by numbers in {numbers}, "
            f"numpy copies them in {copied}; all, once in {args.max_input_len} steps, {each:.3f} ms a step"
        )


def opened(folder: Path, group: CacheGroup) -> tuple[Callable[[], object], Callable[[], object]]:
    """The move, and the same with an index for every number, each on caches of its own."""
    backend = make_backend("ort-cpu", threads=1)
    (spec,) = shift_specs((group,), "float32").values()
    (model,) = shift_graphs((group,), "float32").values()
    runs = []
    for name, graph, boundary in (("shift", model, spec), ("compact", *by_numbers(group, spec))):
        ir.save(graph, folder / f"{name}.onnx")
        boundary = GraphSpec(f"{name}.onnx", boundary.inputs, boundary.outputs)
        opened_graph: Graph = backend._open(folder, boundary, {"B": (1, 1)})
        shape = (1, group.kv_heads, group.capacity, group.head_size)
        opened_graph.bind_caches({t.name: backend.zeros(shape, "float32") for t in boundary.inputs[1:]})
        feeds = {"first_kept": np.array([group.capacity - WINDOW])}
        if name == "compact":
            feeds = {"order": np.arange(WINDOW)[None, None] + group.capacity - WINDOW}
        runs.append(lambda graph=opened_graph, feeds=feeds: graph.run(feeds))
    return runs[0], runs[1]


def by_numbers(group: CacheGroup, spec: GraphSpec) -> tuple[ir.Model, GraphSpec]:
    """The move as :mod:`vlmtrim.graphs.caching` compacts."""
    order = TensorSpec("order", "int64", ("B", 1, WINDOW))
    values = {t.name: ir.val(t.name, dtype=ir.DataType.FLOAT, shape=t.shape) for t in spec.inputs[1:]}
    entry, ops = ir.val("order", dtype=ir.DataType.INT64, shape=order.shape), Ops("compact")
    shape = ops.concat(ops.dim(entry, 0), ops.const([group.kv_heads, WINDOW, group.head_size]))
    index = ops("Expand", ops("Unsqueeze", entry, ops.const([3])), shape)
    begin, outputs = ops("Expand", ops.const([0]), ops.dim(entry, 0)), []
    for kind in ("key", "value"):
        past = values[f"past_key_values.{kind}"]
        outputs.append(ops("TensorScatter", past, ops("GatherElements", past, index, axis=2), begin, axis=2))
        outputs[-1].name, outputs[-1].type, outputs[-1].shape = f"present.{kind}", past.type, past.shape
    graph = ir.Graph([entry, *values.values()], outputs, nodes=ops.nodes, opset_imports={"": 24}, name="compact")
    return ir.Model(graph, ir_version=10), GraphSpec("compact.onnx", (order, *spec.inputs[1:]), spec.outputs)


def copying(group: CacheGroup) -> Callable[[], object]:
    """numpy's copy of the window of keys and values."""
    caches = np.zeros((2, group.kv_heads, group.capacity, group.head_size), np.float32)

    def copy() -> None:
        caches[:, :, :WINDOW] = caches[:, :, -WINDOW:].copy()

    return copy


def interleaved(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of CPU time of each, run in turn; two rounds of warming up do not count."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 2):
        for work, spent in zip(works, times, strict=True):
            start = time.process_time()
            work()
            if turn > 1:
                spent.append(time.process_time() - start)
    return [statistics.median(spent) for spent in times]


if __name__ == "__main__":
    main()
