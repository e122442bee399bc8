"""Rotary embeddings of the standard domain (opset 23) and of com.microsoft: what was before them, and new ones."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import rows
from vlmtrim.graphs.foreign.boundary import rank
from vlmtrim.graphs.foreign.nodes import MICROSOFT, kind, number, operand, said
from vlmtrim.graphs.ops import Ops

_OPERATOR = "RotaryEmbedding"
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
