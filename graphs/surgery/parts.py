"""The parts of a layer, and its queries of other tokens, computed beside its own.

Shapes: B rows, S tokens of this step, R tokens that are asked for, H query heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import Layer, before_scaling, graph_input, seam_before
from vlmtrim.graphs.surgery.attention import head_counts
from vlmtrim.graphs.surgery.region import SideInputs, downstream, upstream
from vlmtrim.graphs.surgery.select import gather_tokens


@dataclass(frozen=True)
class Parts:
    """Values of a layer that runs on the step's tokens, or on each row's last one.

    Attributes:
        seam: the residual stream on entry.
        normed: its norm, which keys and values read.
        added: what the attention adds to it.
        state, ids, tables: what queries read: states, position ids by their shape, cosines and sines.
        key_tables: the tables of all tokens.
        one_row: whether queries are of each row's last token alone (:mod:`vlmtrim.graphs.passes.last_row`).
    """

    seam: ir.Value
    normed: ir.Value
    added: ir.Value
    state: ir.Value
    ids: ir.Value
    tables: tuple[ir.Value, ...]
    key_tables: tuple[ir.Value, ...]
    one_row: bool


def parts_of(model: ir.Model, layers: list[Layer], layer: Layer, ids: ir.Value | None = None) -> Parts:
    """Of one of the ``layers`` of a decoder; ``ids`` are its position ids, unless they are those of the whole step.

    Raises GraphError where the layer is not of the form that is known.
    """
    seam = seam_before(model, layers, layer.index) if layer.index else graph_input(model, "inputs_embeds")
    key, value = layer.key_update.inputs[1], layer.value_update.inputs[1]
    assert key is not None and value is not None
    normed = _projected(key)
    if normed is not _projected(value) or not (normed is seam or normed.producer() in downstream(seam)):
        raise GraphError(f"keys and values of attention {layer.index} are not projections of the same states")
    one_row = layer.query.shape is not None and layer.query.shape[2] == 1
    state, ids = normed, ids or graph_input(model, "position_ids")
    if one_row:
        before = upstream(layer.query)
        state, ids = _row_of(before, seam), _gathered(before, ids)
    added = layer.attention.outputs[0]
    while True:
        readers = [node for node, _ in added.uses()]
        if len(readers) != 1 or len(readers[0].outputs) != 1:
            raise GraphError(f"{added.name} is read by {len(readers)} nodes; expected the way to the residual stream")
        if readers[0].op_type == "Add" and (state if one_row else seam) in readers[0].inputs:
            return Parts(seam, normed, added, state, ids, _rotary(layer.query), _rotary(key), one_row)
        added = readers[0].outputs[0]


def queries_at(
    model: ir.Model,
    ops: Ops,
    layer: Layer,
    parts: Parts,
    rows: ir.Value,
    batch: ir.Value,
    table: Callable[[ir.Value, ir.Value], ir.Value],
    embeds: ir.Value | None = None,
    name: str = "probe",
) -> tuple[ir.Value, list[ir.Node]]:
    """(queries [B, H, R, Dh] of the tokens at ``rows`` [B, R], cloned nodes to put into the graph).

    ``batch`` is B, [1]; ``table`` gathers cosines or sines at the rows; ``embeds`` is what the layer reads its sizes
    of, unless those are the whole step's; ``name`` is of what is cloned.
    """
    embeds, ids = embeds or graph_input(model, "inputs_embeds"), graph_input(model, "position_ids")
    at_rows = gather_tokens(ops, parts.seam if parts.one_row else parts.normed, rows)
    roots = {parts.state: at_rows, parts.ids: stand_in(ops, ids, rows)}
    if not parts.one_row:
        roots[embeds] = at_rows
    roots |= {o: table(n, rows) for o, n in zip(parts.tables, parts.key_tables, strict=True)}
    side = SideInputs(roots, shape_only=None, suffix=f".{name}{layer.index}")
    found = side.derive(layer.query)
    heads, _, size = head_counts(layer)
    shape = ops.concat(batch, ops.dim(rows, 1), ops.const([heads]), ops.const([size]))
    for node in side.cloned:
        if node.op_type == "Reshape" and len(node.outputs[0].shape or ()) == 4:
            node.replace_input_with(1, shape)  # no -1: where there are no rows, it could be anything
        for value in node.outputs:
            value.shape = None  # named after the layer's own tokens
    return found, side.cloned


def stand_in(ops: Ops, ids: ir.Value, indices: ir.Value) -> ir.Value:
    """``indices`` [B, R] in place of position ids, whose shape alone is read: the tables are gathered."""
    return ops("Unsqueeze", indices, ops.const([0])) if len(ids.shape or ()) > 2 else indices


def _projected(value: ir.Value) -> ir.Value:
    """The states [B, S, D] whose projection a key or a value is."""
    node = value.producer()
    while node is not None and node.op_type != "MatMul":
        value = next(v for v in node.inputs if v is not None and v.producer() is not None)  # biases have no producer
        node = value.producer()
    if node is None or node.inputs[0] is None:
        raise GraphError(f"{value.name} is no projection of token states by a MatMul")
    return node.inputs[0]


def _row_of(nodes: set[ir.Node], states: ir.Value) -> ir.Value:
    """What one of the nodes made of states by :mod:`vlmtrim.graphs.passes.last_row`: [B, 1, D]."""
    masked = [node.outputs[0] for node in nodes if node.op_type == "Where" and node.inputs[1] is states]
    found = [node for node in nodes if node.op_type == "ReduceSum" and node.inputs[0] in masked]
    if len(found) != 1:
        raise GraphError(f"{len(found)} sums pick a row of {states.name} for the last layer's query; expected one")
    return found[0].outputs[0]


def _gathered(nodes: set[ir.Node], source: ir.Value) -> ir.Value:
    """What one of the nodes gathered of a value."""
    found = [node for node in nodes if node.op_type.startswith("Gather") and node.inputs[0] is source]
    if len(found) != 1:
        raise GraphError(f"{source.name} is gathered by {len(found)} nodes before the last layer's query; expected one")
    return found[0].outputs[0]


def _rotary(value: ir.Value) -> tuple[ir.Value, ...]:
    """Cosines and sines of the rotary embedding that queries or keys come from."""
    node = before_scaling(value)[0].producer()
    if node is None or node.op_type != "RotaryEmbedding":
        raise GraphError(f"{value.name} does not come from a RotaryEmbedding (opset 23), whose tables are gathered")
    return tuple(table for table in node.inputs[1:3] if table is not None)
