"""Rotary embeddings of the standard domain (opset 23) and of com.microsoft: what was before them, and new ones."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.nodes import MICROSOFT, kind, said
from vlmtrim.graphs.ops import Ops

_UNCHANGED = ("Identity", "Cast", "Mul")  # Mul: the factor on the scores


def before(where: str, value: ir.Value | None) -> ir.Value:
    """Queries or keys before their rotary embedding. Raises GraphError where they do not come from one."""
    node = None if value is None else value.producer()
    while node is not None and kind(node)[0] == "" and node.op_type in _UNCHANGED:
        node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
    if node is None or node.op_type != "RotaryEmbedding" or node.inputs[0] is None:
        raise GraphError(f"{where}: score no-rope expects queries and keys from RotaryEmbedding; found {said(node)}")
    return node.inputs[0]


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
