"""Builds the graphs that move a window to the front of its caches (:class:`vlmtrim.graphs.contract.CacheGroup`)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmtrim.graphs.boundary import shift_specs
from vlmtrim.graphs.caching import Building
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.lint import lint


def shift_graphs(groups: Sequence[CacheGroup], dtype: str) -> dict[str, ir.Model]:
    """A graph for every shape of caches that have a window, by name, held to its spec."""
    specs = shift_specs(groups, dtype)
    models = {}
    for group in groups:
        if group.window and group.shift not in models:
            models[group.shift] = _shift(group, Building(specs[group.shift], "shift"))
            lint(models[group.shift], specs[group.shift])
    return models


def _shift(group: CacheGroup, graph: Building) -> ir.Model:
    """Entries ``first_kept`` and the window behind it, read as rows of one long table, so that whole entries are
    copied; all of them before the first one is overwritten."""
    ops, first, caches = graph.ops, graph["first_kept"], {}
    batch = ops.dim(first, 0)
    row = ops("Range", ops.const(0), ops("Squeeze", batch, ops.const([0])), ops.const(1))
    row = ops("Unsqueeze", ops("Mul", row, ops.const(group.kv_heads)), ops.const([1, 2]))
    head = ops("Add", row, ops.const([[[head] for head in range(group.kv_heads)]]))  # [B, KV, 1], of all rows' heads
    slot = ops("Add", ops("Unsqueeze", first, ops.const([1, 2])), ops.const([[list(range(group.window))]]))
    index = ops("Add", ops("Mul", head, ops.const(group.capacity)), slot)  # [B, KV, window]
    begin = ops("Sub", first, first)
    for kind in ("key", "value"):
        past = graph[f"past_key_values.{kind}"]
        table = ops("Reshape", past, ops.const([-1, group.head_size]))
        caches[f"present_{kind}"] = ops("TensorScatter", past, ops("Gather", table, index, axis=0), begin, axis=2)
    return graph.finish(**caches)
