"""Holds a graph to its contract; run between the stages of an export, so that the guilty stage is found."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmtrim.graphs.agreement import chain_problem
from vlmtrim.graphs.contract import GraphSpec, TensorSpec
from vlmtrim.graphs.errors import GraphError

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


def lint(model: ir.Model, spec: GraphSpec, weights_bound: bool = False) -> None:
    """Raise GraphError unless the graph keeps its promises.

    1. standard operators only, opset 24 or later; 2. inputs and outputs equal the spec in name, order, dtype and
    shape; 3. every value is produced before it is read; 4. once weights are bound, no placeholder is left.
    """
    domains = sorted({node.domain for node in model.graph if node.domain not in ("", "ai.onnx")})
    if domains:
        raise GraphError(f"{spec.file} has nodes of the domain {domains[0]!r}; only standard operators are allowed")
    opset = model.opset_imports.get("", 0)
    if opset < 24:
        raise GraphError(f"{spec.file} has opset {opset}; TensorScatter needs 24")
    _same_boundary(spec.file, "inputs", [_spec(v) for v in model.graph.inputs], spec.inputs)
    _same_boundary(spec.file, "outputs", [_spec(v) for v in model.graph.outputs], spec.outputs)
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise GraphError(f"{spec.file}: {node.op_type} ({node.name}) reads {value.name} before it exists")
        known.update(node.outputs)
    if weights_bound:
        for name, value in model.graph.initializers.items():
            if name.startswith("full.") or value.const_value is None:
                raise GraphError(f"{spec.file}: the weight {name} is bound to no tensor of the checkpoint")


def _spec(value: ir.Value) -> TensorSpec:
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    dtype = _DTYPES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "?"
    return TensorSpec(str(value.name), dtype, dims)


def boundary(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a graph as a contract states them."""
    return tuple(map(_spec, model.graph.inputs)), tuple(map(_spec, model.graph.outputs))


def lint_chain(chain: Sequence[GraphSpec], whole: GraphSpec) -> None:
    """Raise GraphError unless a chain of graphs takes and returns what the whole graph does, and nothing else."""
    if (problem := chain_problem(chain, whole)) is not None:
        raise GraphError(problem)


def _same_boundary(file: str, kind: str, found: list[TensorSpec], promised: tuple[TensorSpec, ...]) -> None:
    for have, want in zip(found, promised, strict=False):
        if have != want:
            raise GraphError(f"{file}: the contract promises {kind[:-1]} {want}, the graph has {have}")
    if len(found) != len(promised):
        raise GraphError(f"{file}: the contract promises {len(promised)} {kind}, the graph has {len(found)}")


def node_counts(model: ir.Model) -> dict[str, int]:
    """Nodes per operator, most frequent first."""
    tally: dict[str, int] = {}
    for node in model.graph:
        tally[node.op_type] = tally.get(node.op_type, 0) + 1
    return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))
