"""A program of torch.export in operators that torch.onnx translates as they are.

``torch.onnx.export`` runs the decompositions of every program, which traces it twice more and takes longer than tracing
the model did. What these models hold that has no translation are a few operators that another one says as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten: Any = torch.ops.aten


class Settled(ExportedProgram):
    """A program in which nothing is left to decompose."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """This program."""
        return self


def settle(program: ExportedProgram) -> ExportedProgram:
    """The program with its operators replaced, in place; as it is where one of them writes into its input."""
    graph = program.graph_module.graph
    calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if any(node.target._schema.is_mutable for node in calls):
        return program
    for node in calls:
        if node.target in REPLACED:
            with graph.inserting_before(node):
                REPLACED[node.target](node)
    program.graph_module.recompile()
    return Settled(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _cast(node: Node) -> None:
    node.target, node.kwargs = aten._to_copy.default, {"dtype": node.args[1]}
    node.args = node.args[:1]


def _same(node: Node) -> None:
    node.target, node.args, node.kwargs = aten.alias.default, node.args[:1], {}


def _both(node: Node) -> None:
    node.target = aten.bitwise_and.Tensor


def _reshape(node: Node) -> None:
    """As a view of a copy in order: what is transposed has no view of every shape."""
    source, graph, (_, sizes) = node.args[0], node.graph, node.args
    assert isinstance(source, Node) and isinstance(sizes, list | tuple)
    copy = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta = {**node.meta, "val": source.meta["val"]}
    known = [
        size if isinstance(size, int) else given for size, given in zip(node.meta["val"].shape, sizes, strict=True)
    ]
    node.target, node.args = aten._unsafe_view.default, (copy, known)  # a -1 beside an empty axis is none to ONNX


def _flatten(node: Node) -> None:
    source: Any = node.args[0]
    given: Any = (*node.args[1:], *(0, -1)[len(node.args) - 1 :])
    first, last = (axis % source.meta["val"].dim() for axis in given)
    sizes: list[Any] = []
    for axis, size in enumerate(source.meta["val"].shape):
        if axis == first:
            sizes.append(-1)
        elif not first < axis <= last:
            sizes.append(_size(source, axis, size))
    node.args = (source, sizes)
    _reshape(node)


def _size(source: Node, axis: int, size: Any) -> Any:
    """A size as an argument: the program reads most of those that are symbols from its inputs already."""
    if isinstance(size, int):
        return size
    for node in source.graph.nodes:
        if node is source:
            break
        if node.target is aten.sym_size.int and str(node.meta["val"]) == str(size):
            return node
    read = source.graph.call_function(aten.sym_size.int, (source, axis))
    read.meta["val"] = size
    return read


def _convolve(node: Node) -> None:
    """Padding by name; the windows of patches do not overlap and need none."""
    given: Any = (*node.args[3:], *([1, 1], "valid", [1, 1], 1)[len(node.args) - 3 :])
    if given[1] == "valid":
        node.target, node.args = aten.conv2d.default, (*node.args[:3], given[0], [0, 0], *given[2:])


REPLACED: dict[Any, Callable[[Node], None]] = {
    aten.to.dtype: _cast,
    aten.to.device: _same,
    aten.__and__.Tensor: _both,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _flatten,
    aten.conv2d.padding: _convolve,
}
