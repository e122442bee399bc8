"""Picking tokens one by one, each pick depending on the ones before: a Loop that every library builds.

TensorRT-RTX 1.7 refuses loops over integer states, ArgMax and gathers; float states of shape [B, 1, N], TopK of one
and products with a one-hot row build. Shapes: B rows, N tokens, M picks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.ops import Ops

# Taken off the value of a token that is picked; values lie well inside (-SPENT / 2, SPENT / 2).
SPENT = 64.0


def best(ops: Ops, values: ir.Value, number: ir.Value) -> ir.Value:
    """One-hot row float32 [B, 1, N] of the largest of ``values`` [B, 1, N], of equals the first; number: 0 .. N-1."""
    _, index = ops("TopK", values, ops.const([1]), outputs=2, axis=2, largest=1, sorted=1)
    return ops("Cast", ops("Equal", number, index), to=ir.DataType.FLOAT)


def picked(ops: Ops, values: ir.Value) -> ir.Value:
    """1.0 for tokens that were picked, 0.0 for the others: float32 [B, 1, N]."""
    return ops("Cast", ops("Less", values, ops.const(-SPENT / 2, np.float32)), to=ir.DataType.FLOAT)


def repeat(
    ops: Ops, trips: ir.Value, states: list[ir.Value], body: Callable[[Ops, ir.Value, list[ir.Value]], list[ir.Value]]
) -> list[ir.Value]:
    """Run ``body(ops, number, states)`` [1] ``trips`` times; it returns the new states, and may read values outside."""
    number = ir.val("number", dtype=ir.DataType.INT64, shape=())
    going = ir.val("going", dtype=ir.DataType.BOOL, shape=())
    entering = [ir.val(f"state_{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in range(len(states))]
    inner = Ops(f"{ops.prefix}/pick")
    leaving = [inner("Identity", going), *body(inner, number, entering)]
    for value, dtype in zip(leaving, (ir.DataType.BOOL, *[ir.DataType.FLOAT] * len(states)), strict=True):
        value.type = ir.TensorType(dtype)
    graph = ir.Graph([number, going, *entering], leaving, nodes=inner.nodes, name="pick")
    trip = ops("Squeeze", trips, ops.const([0]))
    found = ops("Loop", trip, ops.const(True, np.bool_), *states, outputs=max(2, len(states)), body=graph)
    return list(found)
