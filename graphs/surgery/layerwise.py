"""Lets every layer of a decoder keep its own tokens of a step: what is left out is rebuilt layer by layer.

Shapes: B rows, S tokens of this step, N visual tokens, M that may stay in a layer, T = S - N + M tokens that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.contract import LAST_SEEN, most_features
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import Layer, graph_input
from vlmtrim.graphs.surgery.parts import Parts, parts_of, queries_at, stand_in
from vlmtrim.graphs.surgery.region import SideInputs, upstream
from vlmtrim.graphs.surgery.select import gather_tokens
from vlmtrim.graphs.surgery.split import common_capacity, drop_unused, rename_dims, shrink_caches


@dataclass(frozen=True)
class Choice:
    """What a layer keeps.

    indices int64 [B, T]: tokens that stay, ascending, then filling, which lies behind the last entry that counts, so
    that causality hides it and the next step writes over it; slots int64 [B, S]: where each token is among them, T
    where it is not; kept int64 [B, 1]: visual tokens that count; size int64 [1]: T.
    """

    indices: ir.Value
    slots: ir.Value
    kept: ir.Value
    size: ir.Value


class Layerwise:
    """One pass over a plain decoder; the inputs of a step as values, and the changes to its layers."""

    def __init__(self, model: ir.Model, layers: list[Layer]):
        if any(value.name == "visual_positions" for value in model.graph.inputs):
            raise GraphError("the decoder already selects visual tokens; start from the unpruned export")
        if any(value.name == LAST_SEEN for value in model.graph.inputs):
            raise GraphError("visual tokens attend to later ones; choosing layer by layer is for causal decoders")
        self._model, self._layers = model, layers
        self.most_visual = common_capacity(layers)
        self._parts = [parts_of(model, layers, layer) for layer in layers]
        self.ops = ops = Ops("keep")
        self._embeds, self._ids = graph_input(model, "inputs_embeds"), graph_input(model, "position_ids")
        self.last_index = graph_input(model, "last_index")
        self.positions = ir.val("visual_positions", dtype=ir.DataType.INT64, shape=("B", "N"))
        model.graph.inputs.insert(3, self.positions)
        self.batch, self.tokens = ops.dim(self._embeds, 0), ops.dim(self._embeds, 1)
        self.visual = ops.dim(self.positions, 1)
        everywhere = ops.concat(self.batch, self.tokens)
        gone = ops("Expand", ops.const([0]), ops("Shape", self.positions))
        self._text = ops("ScatterElements", ops("Expand", ops.const([1]), everywhere), self.positions, gone, axis=1)
        self._number = ops("Range", ops.const(0), ops("Squeeze", self.tokens, ops.const([0])), ops.const(1))
        self._numbers = ops("Expand", self._number, everywhere)
        self._text_count = ops("Sub", self.tokens, self.visual)
        self._tables: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self._most: dict[float, ir.Value] = {}
        self._derived: list[ir.Node] = []
        self._inputs: dict[int, list[ir.Value]] = {}
        self._outputs: list[ir.Value] = []

    def most(self, share: float) -> ir.Value:
        """M of a layer that keeps at most ``share``, [1]."""
        if share not in self._most:
            table = [most_features(n, share) for n in range(self.most_visual + 1)]
            self._most[share] = self.ops("Gather", self.ops.const(table), self.visual)
        return self._most[share]

    def new_key(self, layer: Layer) -> ir.Value:
        """This step's keys [B, KV, S, Dh]."""
        value = layer.key_update.inputs[1]
        assert value is not None
        return value

    def queries(self, layer: Layer, rows: ir.Value) -> ir.Value:
        """Queries [B, H, R, Dh] of the tokens at ``rows`` [B, R], computed beside the layer's own."""
        parts = self._parts[layer.index]
        found, cloned = queries_at(self._model, self.ops, layer, parts, rows, self.batch, self._table)
        self._derived += cloned
        return found

    def choice(self, ranked: ir.Value, kept: ir.Value | None, most: ir.Value) -> Choice:
        """Text, and of the visual tokens ``ranked`` [B, M], best first, the first ``kept`` [B, 1]; None for all M."""
        ops, one = self.ops, self.ops.const([1])
        if kept is None:
            mark = ops("Expand", one, ops("Shape", ranked))
            count = ops("Expand", most, ops.concat(self.batch, one))
        else:
            count = kept
            place = ops.slice(self._number, ops.const([0]), most, axis=0)
            mark = ops("Cast", ops("Less", place, kept), to=ir.DataType.INT64)
        where = ops("GatherElements", self.positions, ranked, axis=1)
        keep = ops("ScatterElements", self._text, where, mark, axis=1)
        is_kept = ops("Cast", keep, to=ir.DataType.BOOL)
        rank = ops("CumSum", keep, one)
        slot = ops("Sub", rank, one)
        behind = ops("Sub", ops("Add", ops("Add", self._text_count, count), self._number), rank)
        order = ops("ScatterElements", self._numbers, ops("Where", is_kept, slot, behind), self._numbers, axis=1)
        size = ops("Add", self._text_count, most)
        indices = ops.slice(order, ops.const([0]), size, axis=1)
        # At most T: engines are asked for their shapes with positions that repeat, of which fewer are taken out.
        slots = ops("Min", ops("Where", is_kept, slot, size), size)
        return Choice(indices, slots, count, size)

    def rewrite(self, layer: Layer, choice: Choice, capacity: int) -> None:
        """Let a layer run on its choice, with caches of ``capacity``; tokens that do not stay get nothing added."""
        ops, index, parts = self.ops, layer.index, self._parts[layer.index]
        new_key = self.new_key(layer)
        region = (_states(parts.normed) & upstream(parts.added)) - upstream(new_key)
        taken = gather_tokens(ops, parts.normed, choice.indices)
        taken.type, taken.shape = parts.normed.type, self._shape(parts.normed, f"Sk{index}")
        window = graph_input(self._model, "key_positions.0")
        roots = {
            parts.normed: taken,
            self._ids: stand_in(self.ops, self._ids, choice.indices),
            new_key: self._keys(layer, choice),
            layer.write_indices: layer.write_indices,
            window: window,
            self._embeds: taken,
        }
        if index:
            roots[layer.write_indices] = ir.val(f"write_indices.{index}", dtype=ir.DataType.INT64, shape=("B",))
            roots[window] = ir.val(f"key_positions.{index}", dtype=ir.DataType.INT64, shape=(f"W{index}",))
            self._inputs[index] = [roots[layer.write_indices], roots[window]]
        if parts.one_row:  # all visual tokens lie before the last token, and it stays
            gone = ops("Squeeze", ops("Sub", self.visual, choice.kept), ops.const([1]))
            roots[self.last_index] = ops("Sub", self.last_index, gone)
            roots |= {value: value for value in (layer.query, parts.state, parts.ids)}
        else:
            roots |= {table: self._table(table, choice.indices) for table in parts.tables}
        side = SideInputs(roots, shape_only=None, suffix=f".{index}")
        order = [node for node in self._model.graph if node in region]
        side.rewire(order)
        for node in [*order, *side.cloned]:
            rename_dims(node, {"S": f"Sk{index}", "W0": f"W{index}"})
        self._check(side.cloned, roots[self._ids])
        self._move_rows(layer, choice)
        self._derived += side.cloned
        shrink_caches([layer], capacity)
        if not parts.one_row:
            self._add_back(parts, choice)
        self._return(index, choice)

    def finish(self) -> ir.Model:
        """Put all of it into the graph."""
        graph = self._model.graph
        graph.extend([*self.ops.nodes, *self._derived])
        for index, values in self._inputs.items():
            start = graph.inputs.index(self._layers[index].key_cache)
            graph.inputs[start:start] = values
        graph.outputs[1:1] = self._outputs
        drop_unused(self._model)
        graph.sort()
        return self._model

    def _table(self, table: ir.Value, indices: ir.Value) -> ir.Value:
        if (table, indices) not in self._tables:
            self._tables[table, indices] = gather_tokens(self.ops, table, indices)
        return self._tables[table, indices]

    def _keys(self, layer: Layer, choice: Choice) -> ir.Value:
        """The keys of what stays, [B, KV, T, Dh]."""
        ops = self.ops  # gathered by token: the number of heads stays static, which TensorRT's cache update needs
        by_token = gather_tokens(ops, ops("Transpose", self.new_key(layer), perm=[0, 2, 1, 3]), choice.indices)
        return ops("Transpose", by_token, perm=[0, 2, 1, 3])

    def _add_back(self, parts: Parts, choice: Choice) -> None:
        """The layer's output for all tokens: zero, one row behind the others, for those that do not stay."""
        ops, added = self.ops, parts.added
        width = ops.const([int((parts.seam.shape or ())[-1])])  # type: ignore[arg-type]
        readers = list(added.uses())
        zero = ops("CastLike", ops.const(0.0, np.float32), added)
        nothing = ops("Expand", zero, ops.concat(self.batch, ops.const([1]), width))
        whole = gather_tokens(ops, ops("Concat", added, nothing, axis=1), choice.slots)
        whole.type, whole.shape = added.type, self._shape(parts.seam, "S")
        for node, place in readers:
            node.replace_input_with(place, whole)

    def _move_rows(self, layer: Layer, choice: Choice) -> None:
        """Let the queries that are returned be of the same tokens among those that stay."""
        returned = next((v for v in self._model.graph.outputs if v.name == f"score_queries.{layer.index}"), None)
        if returned is None or self._parts[layer.index].one_row:  # there they are of all tokens
            return
        ops, rows = self.ops, graph_input(self._model, "score_rows")
        slots = ops("GatherElements", choice.slots, rows, axis=1)
        slots = ops("Min", slots, ops("Sub", choice.size, ops.const([1])))
        side = SideInputs({rows: slots}, shape_only=None, suffix=f".rows{layer.index}")
        node = returned.producer()
        assert node is not None
        node.replace_input_with(0, side.derive(node.inputs[0]))  # type: ignore[arg-type]
        self._derived += side.cloned

    def _return(self, index: int, choice: Choice) -> None:
        counts = self.ops("Squeeze", choice.kept, self.ops.const([1]))
        for value, name, shape in (
            (choice.indices, f"kept_indices.{index}", ("B", f"Sk{index}")),
            (counts, f"kept_counts.{index}", ("B",)),
        ):
            value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.INT64), ir.Shape(shape)
            self._outputs.append(value)

    @staticmethod
    def _shape(value: ir.Value, tokens: str) -> ir.Shape:
        return ir.Shape(("B", tokens, *list(value.shape or ())[2:]))

    @staticmethod
    def _check(cloned: list[ir.Node], stand_in: ir.Value) -> None:
        for node in cloned:
            if stand_in in node.inputs and node.op_type != "Shape":
                raise GraphError(f"{node.op_type} ({node.name}) reads position ids in a layer; only tables may be read")


def _states(value: ir.Value) -> set[ir.Node]:
    """Nodes that depend on what ``value`` holds, not on its shape alone."""
    found: set[ir.Node] = set()
    stack = [value]
    while stack:
        for node, _ in stack.pop().uses():
            if node not in found and node.op_type != "Shape":
                found.add(node)
                stack.extend(node.outputs)
    return found
