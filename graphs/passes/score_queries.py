"""The decoder also returns the queries of rows that it is told: what a cache policy scores the caches by.

They are read before a selection is inserted; one that removes tokens then finds the rows among those that stay
(:mod:`vlmtrim.graphs.surgery.split`, :mod:`vlmtrim.graphs.surgery.layerwise`). Applied to the plain decoder, behind
:mod:`vlmtrim.graphs.passes.last_row`. Shapes: B rows of a batch, H query heads, S tokens of this step, R query rows.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery import attention
from vlmtrim.graphs.surgery.anatomy import find_layers, graph_input
from vlmtrim.graphs.surgery.parts import parts_of, queries_at
from vlmtrim.graphs.surgery.select import gather_tokens

ROWS = "score_rows"


def score_queries(model: ir.Model) -> ir.Model:
    """Add the input ``score_rows`` int64 [B, R] and an output ``score_queries.L`` [B, H, R, Dh] a layer, in place, and
    return the model. With R = 0 nothing is computed.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, no selection.
    """
    layers, ops, derived = find_layers(model), Ops("watch"), []
    if any(layer.crosses for layer in layers):
        raise GraphError("the decoder has cross-attention layers, whose caches hold no visual tokens of the sequence")
    rows = ir.val(ROWS, dtype=ir.DataType.INT64, shape=("B", "R"))
    model.graph.inputs.insert(3, rows)
    batch = ops.dim(graph_input(model, "inputs_embeds"), 0)
    for layer in layers:
        heads, _, size = attention.head_counts(layer)
        parts = parts_of(model, layers, layer) if layer is layers[-1] else None
        if parts is not None and parts.one_row and len(layers) > 1:
            queries, cloned = queries_at(
                model, ops, layer, parts, rows, batch, lambda of, at: gather_tokens(ops, of, at), name="watch"
            )
            derived += cloned
            queries = attention.scaled(ops, layer, queries)
        else:
            queries = attention.query_rows(ops, layer, rows, batch)
        queries = ops("Identity", queries)  # a name of its own, whatever made it
        queries.name, queries.type = f"score_queries.{layer.index}", layer.query.type
        queries.shape = ir.Shape(("B", heads, "R", size))
        model.graph.outputs.insert(1 + layer.index, queries)
    model.graph.extend([*ops.nodes, *derived])
    model.graph.sort()
    return model
