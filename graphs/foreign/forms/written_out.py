"""Attention in elementary operators: Concat with the cache, MatMul, a mask, Softmax, MatMul.

optimum, transformers.js and ``torch.onnx.export`` up to opset 22 write it so. The softmax sees scaled and masked logits
of all heads, so a row of its input is all that a score needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign import rotary
from vlmtrim.graphs.foreign.boundary import Boundary, Cache, rank
from vlmtrim.graphs.foreign.forms import Operands
from vlmtrim.graphs.foreign.nodes import constant, followed, kind, number, operand, said, size
from vlmtrim.graphs.foreign.trial import LAID_OUT, Trial, by_query_head, check_passed_on, softened
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import before_scaling
from vlmtrim.graphs.surgery.attention import mean_of_softmax

READS = frozenset({("", "Concat")})
_TO_PRODUCT = LAID_OUT | {"Mul", "Div"}
_TO_SOFTMAX = frozenset({"Identity", "Cast", "Mul", "Div", "Add", "Sub", "Where", "Tanh", "Max", "Clip"})
_TO_VALUES = frozenset({"Identity", "Cast", "Dropout", "IsNaN", "Where"})  # Where: rows that see nothing become zeros
_ROUNDING = 1e-3


@dataclass(frozen=True)
class WrittenOut:
    """See :class:`vlmtrim.graphs.foreign.forms.Form`; ``node`` is the Softmax, ``joined`` makes keys [B, KV, T, Dh]."""

    index: int
    node: ir.Node
    joined: ir.Node
    cache: Cache

    positions = False

    @property
    def output(self) -> ir.Value:
        """Probabilities [B, H, S, T]."""
        return self.node.outputs[0]

    def rows(self, boundary: Boundary) -> WrittenOutRows:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        logits = operand(self.node, 0)
        assert logits is not None
        if rank(logits) != 4 or number(self.node, "axis", -1) not in (-1, 3):
            raise GraphError(
                f"layer {self.index}: expected {said(self.node)} over the last axis of [B, H, S, T]; found "
                f"{logits.shape}, axis {number(self.node, 'axis', -1):g}"
            )
        return WrittenOutRows(self, boundary, logits)

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.index}: {said(self.node)}"

    def operands(self, ops: Ops, positions: ir.Value, steps: tuple[Trial, ...]) -> Operands:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`. What lies between its products and the softmax is tried out,
        see :mod:`vlmtrim.graphs.foreign.trial`."""
        where, (asked, attended) = self.where, (self.asked(), self.attended())
        keys, values = self.joined.outputs[0], joined_values(self.index, self.cache)
        heads, by_key = by_query_head(steps[0], where, operand(asked, 1), self.cache, keys, turned=True)
        again, by_value = by_query_head(steps[0], where, operand(attended, 1), self.cache, values.outputs[0], False)
        if again != heads or abs(by_value - 1) > _ROUNDING:
            raise GraphError(
                f"{where}: expected values of {heads} heads as they are; found {again}, times {by_value:g}"
            )
        check_passed_on(steps[0], where, operand(attended, 0), self.output, heads)
        scales = [softened(step, where, operand(self.node, 0), asked.outputs[0], heads) for step in steps]
        query, key, value = operand(asked, 0), operand(self.joined, 1), operand(values, 1)
        assert query is not None and key is not None and value is not None
        query, by_query = before_scaling(query)  # one factor on queries is enough, and TensorRT-RTX 1.7 builds no two
        scalar, width = constant(by_query), size(keys, 3) or size(self.cache.key, 3)
        scale = by_key * scales[0] * (1.0 if scalar is None else scalar.item())
        assert width is not None
        query, key = (rotary.fused(ops, steps[1], where, states, width) for states in (query, key))
        return Operands(query, key, value, scale, heads, width, (keys, values.outputs[0]))

    def put(self, ops: Ops, attended: ir.Value) -> None:
        """See :class:`vlmtrim.graphs.foreign.forms.Form`."""
        self.attended().outputs[0].replace_all_uses_with(attended)

    def asked(self) -> ir.Node:
        """The product of queries with keys."""
        return next(node for node, _ in followed(self.joined.outputs[0], _TO_PRODUCT) if node.op_type == "MatMul")

    def attended(self) -> ir.Node:
        """The product of probabilities with values. Raises GraphError where there is none, or another reader."""
        readers = followed(self.output, _TO_VALUES)
        if len(readers) != 1 or readers[0][0].op_type != "MatMul" or readers[0][1] != 0:
            found = ", ".join(said(node) for node, _ in readers[:4]) or "nothing"
            raise GraphError(f"{self.where}: expected a MatMul of its probabilities with values alone; found {found}")
        return readers[0][0]

    def place(self, ops: Ops, positions: ir.Value) -> None:
        """Nothing to do: positions come from outside."""


@dataclass(frozen=True)
class WrittenOutRows:
    """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""

    layer: WrittenOut
    boundary: Boundary
    logits: ir.Value

    def last(self, ops: Ops, last_index: ir.Value, batch: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        index = ops("Reshape", last_index, ops.const([-1, 1, 1, 1]))
        shape = ops.concat(batch, ops.dim(self.logits, 1), ops.const([1]), ops.dim(self.logits, 3))
        row = ops("GatherElements", self.logits, ops("Expand", index, shape), axis=2)
        past = ops.dim(self.layer.cache.key, 2)
        return mean_of_softmax(ops, ops("Cast", row, to=ir.DataType.FLOAT)), ops("Expand", past, batch)

    def unrotated(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """Not to be had: nothing in the graph is named a rotary embedding."""
        raise GraphError(
            f"layer {self.layer.index}: score no-rope expects RotaryEmbedding before the attention; found it written "
            "out: choose another score"
        )

    def new_keys(self, ops: Ops, last_index: ir.Value, batch: ir.Value, tokens: ir.Value) -> ir.Value:
        """See :class:`vlmtrim.graphs.surgery.attention.Rows`."""
        return self.layer.joined.inputs[1]  # type: ignore[return-value]


def match(index: int, node: ir.Node, cache: Cache) -> WrittenOut | None:
    """The layer whose past keys ``node`` joins with new ones; None where a fused attention reads them."""
    check_joined(index, node, "keys")
    products = [reader for reader, _ in followed(node.outputs[0], _TO_PRODUCT) if reader.op_type == "MatMul"]
    if not products:
        fused = [reader for reader, _ in followed(node.outputs[0], _TO_PRODUCT) if "Attention" in reader.op_type]
        if fused:
            return None
        raise GraphError(f"layer {index}: expected a MatMul of queries with the keys of {said(node)}; found none")
    ends = [reader for product in products for reader, _ in followed(product.outputs[0], _TO_SOFTMAX)]
    softmaxes = list(dict.fromkeys(reader for reader in ends if reader.op_type == "Softmax"))
    if len(softmaxes) != 1:
        found = ", ".join(said(reader) for reader in (softmaxes or ends)[:4]) or "nothing"
        raise GraphError(f"layer {index}: expected one Softmax behind {said(products[0])}; found {found}")
    return WrittenOut(index, softmaxes[0], node, cache)


def check_joined(index: int, node: ir.Node, what: str) -> None:
    """Raise GraphError where a Concat does not put new entries [B, KV, S, Dh] behind those of a cache."""
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != 2 or number(node, "axis", 0) not in (2, -2) or len(node.outputs) != 1:
        raise GraphError(
            f"layer {index}: expected {said(node)} to put new {what} behind those of the cache, along axis 2; found "
            f"{len(inputs)} inputs, axis {number(node, 'axis', 0):g}"
        )


def joined_values(index: int, cache: Cache) -> ir.Node:
    """The Concat that puts new values behind those of the cache. Raises GraphError where there is none."""
    readers = [node for node, _ in followed(cache.value, frozenset({"Identity", "Cast"})) if kind(node) in READS]
    if len(readers) != 1:
        raise GraphError(
            f"layer {index}: expected one Concat of {cache.value.name} with new values; found {len(readers)}"
        )
    check_joined(index, readers[0], "values")
    return readers[0]
