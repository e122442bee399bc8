"""Rotary embeddings of the standard domain, of com.microsoft, and written out: the states before them, and new ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import rows
from vlmtrim.graphs.foreign.boundary import rank
from vlmtrim.graphs.foreign.nodes import MICROSOFT, kind, number, operand, said, size
from vlmtrim.graphs.foreign.trial import SAME, Trial, factor
from vlmtrim.graphs.ops import Ops

_OPERATOR = "RotaryEmbedding"
_FLOATS = "fV"  # numpy's kinds, bfloat16 among them
_TURNING = 3  # nodes one behind the other between states and their turned halves: a slice, its negative, both joined
_UNCHANGED = ("Identity", "Cast", "Mul")  # Mul: the factor on the scores


def before(where: str, value: ir.Value | None) -> ir.Value:
    """Queries or keys before their rotary embedding. Raises GraphError where they do not come from one."""
    node = None if value is None else value.producer()
    while node is not None and kind(node)[0] == "" and node.op_type in _UNCHANGED:
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    if node is None or node.op_type != _OPERATOR or node.inputs[0] is None:
        raise GraphError(f"{where}: score no-rope expects queries and keys from RotaryEmbedding; found {said(node)}")
    return node.inputs[0]


def by_head(ops: Ops, states: ir.Value, heads: int, head_size: int) -> ir.Value:
    """[B, S, H * Dh] -> [B, H, S, Dh], before the rotary embedding where it comes from one, which is taken along."""
    node = states.producer()
    if rank(states) == 4 or node is None or kind(node) not in (("", _OPERATOR), (MICROSOFT, _OPERATOR)):
        return rows.by_head(ops, states, heads, head_size)
    value, *rest = node.inputs
    assert value is not None
    if kind(node)[0] == MICROSOFT:
        positions, *tables = rest
    else:
        tables, positions = rest[:2], operand(node, 3)
    tables = [table if positions is None else ops("Gather", table, positions) for table in tables]
    names = ("rotary_embedding_dim", "interleaved")
    settings = {name: int(number(node, name, 0)) for name in names}
    return ops(_OPERATOR, rows.by_head(ops, value, heads, head_size), *tables, **settings)


def fused(ops: Ops, step: Trial, where: str, value: ir.Value, width: int) -> ir.Value:
    """Queries or keys [B, H, S, Dh] from one RotaryEmbedding where its products are written out, as a trial shows;
    rules find the states before it then. Others come back as they are."""
    for states, cos, sin in () if width % 2 else _products(value):
        try:
            tables = [step.of(where, table) for table in (cos, sin)]
            half, heads = width // 2, size(value, 1) or size(states, 1) or 1
            shape = (step.real.shape[0], heads, step.tokens, 2 * half)
            if any(table.shape != (shape[0], 1, *shape[2:]) or table.dtype.kind not in _FLOATS for table in tables):
                continue
            made = np.random.default_rng(5).normal(size=shape).astype(tables[0].dtype)
            want = made * tables[0] + np.concatenate([-made[..., half:], made[..., :half]], -1) * tables[1]
            if abs(factor(step, where, value, states, made, want) - 1) > (SAME if made.itemsize > 2 else 0.01):
                continue
        except GraphError:
            continue
        if all(np.array_equal(table[..., :half], table[..., half:]) for table in tables):
            first = [ops("Squeeze", table, ops.const([1])) for table in (cos, sin)]
            first = [ops.slice(table, ops.const([0]), ops.const([half]), axis=2) for table in first]
            return ops(_OPERATOR, states, *first)
    return value


def _products(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """What may be (states, cosines, sines) in a sum of two products, the other one of states that are turned."""
    node = value.producer()
    terms = [] if node is None or kind(node) != ("", "Add") else [v.producer() for v in node.inputs if v is not None]
    products = [term for term in terms if term is not None and kind(term) == ("", "Mul")]
    if len(products) != 2:
        return
    for one, other in (products, products[::-1]):
        orders = (itertools.permutations(product.inputs) for product in (one, other))
        for (states, cos), (turned, sin) in itertools.product(*orders):
            if states is not None and cos is not None and sin is not None and _reads(turned, states, _TURNING):
                yield states, cos, sin


def _reads(value: ir.Value | None, states: ir.Value, depth: int) -> bool:
    """Whether a value is made of states by so many nodes at most."""
    node = None if value is None else value.producer()
    if node is None or not depth:
        return False
    return any(read is states or _reads(read, states, depth - 1) for read in node.inputs)


def rotated(
    ops: Ops, states: ir.Value, positions: ir.Value, tables: tuple[ir.Value, ir.Value], heads: int, **settings: Any
) -> ir.Value:
    """com.microsoft.RotaryEmbedding of [B, S, H * Dh] at positions int64 [B, S]."""
    node = ir.node(
        "RotaryEmbedding",
        [states, positions, *tables],
        attributes={"num_heads": heads, **settings},
        domain=MICROSOFT,
        name=f"{ops.prefix}/n{len(ops.nodes)}",
    )
    node.outputs[0].name = f"{ops.prefix}/RotaryEmbedding_{len(ops.nodes)}"
    ops.nodes.append(node)
    return node.outputs[0]
