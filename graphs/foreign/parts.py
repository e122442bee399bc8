"""What vision and embedding graphs of others have in common: how they are opened, checked and spoken of."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from vlmtrim.graphs.contract import TensorSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.opset import OPSET, raised
from vlmtrim.graphs.foreign.standard import standardise
from vlmtrim.graphs.foreign.whole import check_flat, check_produced

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


def opened(model: ir.Model) -> dict[str, ir.Value]:
    """Bring a graph into the order, opset, operators and flatness that is read here; returns its inputs by name.

    Raises GraphError where it cannot be brought there.
    """
    if model.functions:
        InlinePass()(model)
    check_produced(model)
    check_flat(model)
    raised(model, OPSET)
    standardise(model)  # shapes are inferred through standard operators alone
    return {value.name or "": value for value in model.graph.inputs if value.name not in model.graph.initializers}


def infer(model: ir.Model) -> None:
    """Shapes behind inputs whose own have been set; those that the file says may be of others."""
    outer = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.outputs:
            if value not in outer:
                value.shape = None
    ShapeInferencePass()(model)


def returned(model: ir.Model, name: str) -> ir.Value:
    """The one output. Raises GraphError where there are several."""
    outputs = list(model.graph.outputs)
    if len(outputs) != 1:
        raise GraphError(f"expected the output {name} alone; found {listed(v.name for v in outputs)}")
    return outputs[0]


def checked(value: ir.Value, spec: TensorSpec) -> ir.Value:
    """A value of the dtype that the bundle has there. Raises GraphError."""
    if value.dtype != DTYPES[spec.dtype]:
        found = next((name for name, dtype in DTYPES.items() if dtype == value.dtype), value.dtype)
        raise GraphError(
            f"expected {value.name} in {spec.dtype}, as the bundle computes; found {found}: give --dtype, or export "
            "the graph again"
        )
    return value


def listed(names: Iterable[str | None]) -> str:
    """Names for a message."""
    found = [str(name) for name in names]
    return ", ".join(found[:8]) + (" and more" if len(found) > 8 else "") or "none"
