"""Parts of a stranger's graph worked out by onnx's reference implementation, node by node.

Only what depends on constants, on shapes and on what is given is worked out; weights are none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.nodes import kind, operand, part_of_shape, said

_WEIGHT = 1 << 16  # constants of more numbers are weights, which nothing here depends on
_SIZES = frozenset({"Shape", "Size"})


class Evaluator:
    """Values of a graph whose inputs are made up. ``depends_on`` says for messages what those are."""

    depends_on = "constants"

    def __init__(self, model: ir.Model):
        self._opset = model.opset_imports.get("", 0)
        self._order = {node: place for place, node in enumerate(model.graph)}
        self._known: dict[ir.Value, np.ndarray | None] = {}
        self._shapes: dict[ir.Value, list[int]] = {}
        self._sizes: dict[str, int] = {}

    def give(self, value: ir.Value, numbers: np.ndarray) -> None:
        """Let an input hold numbers."""
        self._named(value, list(numbers.shape))
        self._known[value] = numbers

    def _named(self, value: ir.Value, shape: list[int]) -> None:
        """Remember an input's shape, and what its dimensions are called; a name of two sizes says nothing."""
        self._shapes[value] = shape
        for dim, found in zip(value.shape or (), shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                self._sizes[dim.value] = found if self._sizes.get(dim.value, found) == found else -1

    def of(self, where: str, value: ir.Value | None, given: Mapping[ir.Value, np.ndarray] | None = None) -> np.ndarray:
        """A value of the graph, where the values in ``given`` are these.

        Raises GraphError where it depends on weights, or on states of tokens that are not given.
        """
        assert value is not None
        local: dict[ir.Value, np.ndarray | None] = dict(given or {})
        for node in self._needed(value, local):
            self._run(node, local)
        found = local.get(value, self._known.get(value))
        if found is None:
            found = self._constant(value)
        if found is None:
            raise GraphError(
                f"{where}: expected {value.name} to depend on {self.depends_on} alone; found more, by "
                f"{said(value.producer())}"
            )
        return found

    def _needed(self, value: ir.Value, local: Mapping[ir.Value, np.ndarray | None]) -> list[ir.Node]:
        """Nodes to run for a value, in order."""
        found: set[ir.Node] = set()
        stack = [value]
        while stack:
            current = stack.pop()
            node = current.producer()
            if current in local or current in self._known or node is None or node in found:
                continue
            found.add(node)
            stack += [v for v in node.inputs if v is not None]
        return sorted((node for node in found if node in self._order), key=self._order.__getitem__)

    def _run(self, node: ir.Node, local: dict[ir.Value, np.ndarray | None]) -> None:
        """Work out a node's outputs, None where that cannot be; what depends on nothing given is kept."""
        inputs = [None if v is None else local.get(v, self._known.get(v)) for v in node.inputs]
        inputs = [self._constant(v) if a is None else a for v, a in zip(node.inputs, inputs, strict=True)]
        into = local if any(v in local for v in node.inputs if v is not None) else self._known
        found: list[np.ndarray | None] = [None] * len(node.outputs)
        if kind(node)[0] == "" and node.op_type in _SIZES and inputs[0] is None:
            found = [self._shape(node)]
        elif all(v is None or a is not None for v, a in zip(node.inputs, inputs, strict=True)):
            found = self._evaluated(node, inputs) or found
        into.update(zip(node.outputs, found, strict=True))

    def _constant(self, value: ir.Value | None) -> np.ndarray | None:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.size > _WEIGHT:
            return None
        try:
            return tensor.numpy()
        except (OSError, ValueError):  # in a file that is not there, or that onnx does not read
            return None

    def _shape(self, node: ir.Node) -> np.ndarray | None:
        """What a Shape or Size returns of a value that is not known, by the names of its dimensions."""
        value = operand(node, 0)
        assert value is not None
        shape = self._shapes.get(value)
        if shape is None and value.shape is not None:
            shape = [dim if isinstance(dim, int) else self._sizes.get(dim.value or "", -1) for dim in value.shape]
        if shape is None:
            return None
        part = shape[part_of_shape(node, len(shape))]
        if -1 in part:
            return None
        return np.array(part if node.op_type == "Shape" else np.prod(part), np.int64)

    def _evaluated(self, node: ir.Node, inputs: list[np.ndarray | None]) -> list[np.ndarray | None] | None:
        from onnx.reference import ReferenceEvaluator

        feeds = {v.name: a for v, a in zip(node.inputs, inputs, strict=True) if v is not None and v.name}
        made = [value.name or "" for value in node.outputs]
        try:
            proto = onnx.FunctionProto(
                name="trial",
                input=[*feeds],
                output=made,
                node=[ir.serde.serialize_node(node)],
                opset_import=[onnx.OperatorSetIdProto(domain="", version=self._opset)],
            )
            with np.errstate(all="ignore"):
                return list(ReferenceEvaluator(proto).run(None, feeds, {}))  # type: ignore[arg-type]
        except Exception:  # a stranger's node may be anything; what cannot be worked out is said to be so
            return None
