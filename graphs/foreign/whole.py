"""What a graph must be for its dataflow to be read: every value made by something, no branches on the tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, ShapeInferencePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import Boundary
from vlmtrim.graphs.foreign.nodes import said
from vlmtrim.graphs.surgery.region import downstream

# Operators whose shapes the forms of attention read.
_TELLING = frozenset({"Softmax", "Attention", "RotaryEmbedding", "MatMul", "Transpose", "Where", "Unsqueeze"})


def check_produced(model: ir.Model) -> None:
    """Bring nodes into order. Raises GraphError where a value that is read or returned comes from nowhere or itself."""
    given = {*model.graph.inputs, *model.graph.initializers.values()}
    read = [(value, said(node)) for node in model.graph for value in node.inputs if value is not None]
    for value, reader in [*read, *((value, "the graph's output") for value in model.graph.outputs)]:
        if value.producer() is None and value not in given:
            raise GraphError(f"{reader} needs {value.name}, which nothing in the graph makes")
    try:
        model.graph.sort()
    except ValueError as error:
        raise GraphError("the graph has a cycle: a node needs what it makes itself") from error


def check_subgraphs(model: ir.Model, boundary: Boundary) -> None:
    """Raise GraphError where a node with a graph inside depends on tokens, masks, positions or caches."""
    nested = [node for node in model.graph if any(True for _ in _inner(node))]
    if not nested:
        return
    given = [boundary.tokens, boundary.mask, boundary.positions]
    given += [value for cache in boundary.caches for value in (cache.key, cache.value)]
    dependent = set().union(*(downstream(value) for value in given if value is not None))
    for node in nested:
        inside = list(_all_nodes(node))
        if node in dependent or any(part in dependent for part in inside):
            raise GraphError(
                f"expected no graph inside a node that depends on the tokens; found {said(node)}: export without "
                "control flow, or simplify the graph first (onnxsim folds branches that never change)"
            )


def infer_missing(model: ir.Model) -> list[ir.Value]:
    """Infer shapes where forms of attention would read them and none are; returns the values that had none."""
    missing = [value for node in model.graph for value in node.outputs if value.shape is None]
    if any(value.producer().op_type in _TELLING for value in missing):  # type: ignore[union-attr]
        ShapeInferencePass()(model)
    return missing


def reinfer(model: ir.Model, outer: Collection[ir.Value], known: frozenset[str]) -> None:
    """Names, and shapes of what is inside, under those names of dimensions; ``outer`` values keep theirs."""
    for node in model.graph:
        for value in node.outputs:
            if value not in outer:
                value.shape = None
    NameFixPass()(model)
    ShapeInferencePass()(model)
    for node in model.graph:  # names that inference made up would go along into what a selection clones
        for value in node.outputs:
            if value.shape is not None:
                dims = [dim if isinstance(dim, int) or dim.value in known else None for dim in value.shape]
                value.shape = ir.Shape(dims)


def check_flat(model: ir.Model) -> None:
    """Raise GraphError where a node has a graph inside."""
    for node in model.graph:
        if any(True for _ in _inner(node)):
            raise GraphError(f"expected no graph inside a node; found {said(node)}: export without control flow")


def _inner(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _all_nodes(node: ir.Node) -> Iterator[ir.Node]:
    for graph in _inner(node):
        for part in graph:
            yield part
            yield from _all_nodes(part)
