"""Builds ONNX nodes from values: ``ops("Add", a, b)`` instead of protobuf and names."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmtrim.graphs.later import ir


class Ops:
    """Collects new nodes in order; the caller puts ``nodes`` into a graph.

    Every value is named ``<prefix>/<op>_<number>`` so that inserted parts are found at once in a viewer.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node of the standard domain; returns its value, or a tuple of values when ``outputs`` > 1."""
        number = len(self.nodes)
        node = ir.node(op_type, inputs, attributes=attributes, num_outputs=outputs, name=f"{self.prefix}/n{number}")
        for index, value in enumerate(node.outputs):
            value.name = f"{self.prefix}/{op_type}_{number}" + (f".{index}" if outputs > 1 else "")
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def const(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant; equal constants share one node."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self.prefix}/const_{len(self._constants)}"
            self._constants[key] = self("Constant", value=ir.tensor(array, name=name))
        return self._constants[key]

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """Size of one axis as an int64 tensor of shape [1]."""
        return self("Shape", value, start=axis, end=axis + 1)

    def concat(self, *values: ir.Value) -> ir.Value:
        """Join [1]-shaped sizes into a shape tensor."""
        return self("Concat", *values, axis=0)

    def slice(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
        """``value[start:end]`` along one axis; start and end are [1] int64 tensors."""
        return self("Slice", value, start, end, self.const([axis]))
