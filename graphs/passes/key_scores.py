"""The decoder also returns how much attention the entries of its caches received from rows that it is told.

What a smaller model tells a larger one (SGL, arXiv 2412.03324): the sum over layers, heads and the rows of the prompt
behind the picture. Shapes: B rows of a batch, S tokens of this step, R query rows that are scored, W live window.
Applied to the plain decoder, behind :mod:`vlmtrim.graphs.passes.last_row`.
"""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.passes.last_row import SUFFIX
from vlmtrim.graphs.surgery import attention
from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input
from vlmtrim.graphs.surgery.parts import parts_of, queries_at
from vlmtrim.graphs.surgery.select import gather_tokens


class Watched:
    """Attention of the rows ``score_rows`` int64 [B, R], layer by layer, weighted by ``score_weights`` float32 [B, R].

    The two become inputs of the graph behind ``last_index``. With R = 0 nothing is computed, and every sum is 0.
    """

    def __init__(self, model: ir.Model):
        self._model, self.layers = model, find_layers(model)
        if any(layer.crosses for layer in self.layers):
            raise GraphError(
                "the decoder has cross-attention layers; attention to visual tokens is emitted, and it has none"
            )
        if any(value.name == "visual_positions" for value in model.graph.inputs):
            raise GraphError(
                "the decoder selects visual tokens, and attention to all of them is emitted; start from "
                "the unpruned export"
            )
        self.ops = Ops("watch")
        self._rows = ir.val("score_rows", dtype=ir.DataType.INT64, shape=("B", "R"))
        weights = ir.val("score_weights", dtype=ir.DataType.FLOAT, shape=("B", "R"))
        model.graph.inputs[3:3] = [self._rows, weights]
        self._batch = self.ops.dim(graph_input(model, "inputs_embeds"), 0)
        self._weights = self.ops("Unsqueeze", weights, self.ops.const([1, 2]))  # [B, 1, 1, R]
        self._limits: dict[ir.Value, ir.Value] = {}
        self._derived: list[ir.Node] = []

    def received(self, layer: Layer) -> ir.Value:
        """Weighted sum over the rows of the softmax over the live window, by head: float32 [B, H, 1, W]."""
        ops = self.ops
        queries, mask = self._queries(layer)
        found = attention.rows_probabilities(ops, layer, queries, self._limit(mask), self._batch)
        return ops("MatMul", self._weights, found)

    def finish(self) -> None:
        """Put what was computed into the graph."""
        self._model.graph.extend([*self.ops.nodes, *self._derived])
        self._model.graph.sort()

    def _queries(self, layer: Layer) -> tuple[ir.Value, ir.Value]:
        """(scaled queries [B, H, R, Dh] of the rows, a mask [B, 1, S, W] with their limits)."""
        ops = self.ops
        if layer is not self.layers[-1]:
            return attention.query_rows(ops, layer, self._rows, self._batch), layer.mask
        parts = parts_of(self._model, self.layers, layer)
        if not parts.one_row:
            return attention.query_rows(ops, layer, self._rows, self._batch), layer.mask
        if len(self.layers) == 1:
            raise GraphError("the decoder has one layer, which runs on the last token alone; emit attention of two")
        queries, cloned = queries_at(
            self._model, ops, layer, parts, self._rows, self._batch, lambda table, rows: gather_tokens(ops, table, rows)
        )
        self._derived += cloned
        return attention.scaled(ops, layer, queries), self._whole_mask(layer)

    def _whole_mask(self, layer: Layer) -> ir.Value:
        """The mask of all tokens that the one of the layer's last row was derived from; other layers have it."""
        masks = {str(other.mask.name): other.mask for other in self.layers[:-1]}
        found = masks.get(str(layer.mask.name).removesuffix(SUFFIX), self.layers[-2].mask if len(masks) == 1 else None)
        if found is None:
            raise GraphError("no other layer attends under the last layer's mask; emit attention of a deeper decoder")
        return found

    def _limit(self, mask: ir.Value) -> ir.Value:
        """Rows [B, 1, R, W] of a mask [B, 1, S, W]."""
        if mask not in self._limits:
            ops, index = self.ops, self.ops("Unsqueeze", self._rows, self.ops.const([1, 3]))
            shape = ops.concat(self._batch, ops.const([1]), ops.dim(self._rows, 1), ops.dim(mask, 3))
            self._limits[mask] = ops("GatherElements", mask, ops("Expand", index, shape), axis=2)
        return self._limits[mask]


def key_scores(model: ir.Model) -> ir.Model:
    """Add the output ``key_scores`` float32 [B, W0], the sum over layers and heads, in place, and return the model.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, one cache group, no selection.
    """
    watched = Watched(model)
    ops, total = watched.ops, None
    for layer in watched.layers:
        received = ops("ReduceSum", watched.received(layer), ops.const([1, 2]), keepdims=0)
        total = received if total is None else ops("Add", total, received)
        # Where a decoder is cut into a chain, this is what crosses.
        total.type, total.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("B", "W0"))
    assert total is not None
    total.name = "key_scores"
    model.graph.outputs.insert(1, total)
    watched.finish()
    return model
