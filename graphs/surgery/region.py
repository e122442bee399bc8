"""Dataflow helpers: what lies behind a value, where all paths meet, and cloning what a region reads from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError


def downstream(value: ir.Value, ignored: Callable[[ir.Value, ir.Node, int], bool] | None = None) -> set[ir.Node]:
    """All nodes that depend on ``value``; ``ignored(value, node, index)`` names uses that make no node depend on it."""
    found: set[ir.Node] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        for node, index in current.uses():
            if node not in found and not (ignored is not None and ignored(current, node, index)):
                found.add(node)
                stack.extend(node.outputs)
    return found


def reads_dtype(node: ir.Node, index: int) -> bool:
    """Whether a node reads of its input ``index`` nothing but the dtype."""
    return node.op_type == "CastLike" and index == 1


def upstream(value: ir.Value) -> set[ir.Node]:
    """All nodes that ``value`` depends on."""
    found: set[ir.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            stack.extend(v for v in node.inputs if v is not None)
    return found


def cut_values(source: ir.Value, sink: ir.Value, order: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """Values that every path from ``source`` to ``sink`` runs through, in order, both ends included.

    ``order`` is a topological order. Each node on a path is an ancestor or a descendant of a cut value, so right
    after a cut value is produced it is the only value still to be consumed.
    """
    for values in cuts(source, sink, order):
        if len(values) == 1:
            yield values[0]


def cuts(source: ir.Value, sink: ir.Value, order: Sequence[ir.Node]) -> Iterator[list[ir.Value]]:
    """The same, and sets of outputs of one node where every path runs through one of them: a norm that returns the sum
    it was taken of as well."""
    between = downstream(source) & upstream(sink)
    yield [source]
    live = {source: _uses_in(source, between)}
    for node in order:
        if node not in between:
            continue
        for value in node.inputs:
            if value is not None and value in live:
                live[value] -= 1
                if live[value] == 0:
                    del live[value]
        for value in node.outputs:
            uses = _uses_in(value, between) + (value is sink)
            if uses:
                live[value] = uses
        if len({value.producer() for value in live}) == 1:
            yield list(live)


def _uses_in(value: ir.Value, nodes: set[ir.Node]) -> int:
    return sum(node in nodes for node, _ in value.uses())


class SideInputs:
    """Re-derives what a region reads from outside for a new set of roots.

    Rules, for a value that a node of the region reads and that is computed outside of it:
    1. a root is replaced by its substitute;
    2. a value that depends on no root (weights, constants, caches) is left as it is;
    3. any other value is cloned, node by node, down to the roots;
    4. refused: a clone that would read the *contents* of ``shape_only`` (they are token states, which only the
       layers may transform); reading its shape or dtype is fine.
    """

    def __init__(self, roots: Mapping[ir.Value, ir.Value], shape_only: ir.Value | None, suffix: str):
        self._substitutes = dict(roots)
        self._shape_only = shape_only
        self._suffix = suffix
        self._dependent = {node for root in roots for node in downstream(root)}
        self.cloned: list[ir.Node] = []

    def rewire(self, region: Iterable[ir.Node]) -> None:
        """Make every node of the region read the re-derived values; new nodes are collected in ``cloned``."""
        nodes = list(region)
        inside = set(nodes)
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is None or value.producer() in inside:
                    continue
                if value is self._shape_only and value is not None:
                    self._check_reads_shape(node, index)
                node.replace_input_with(index, self._substitute(value))

    def derive(self, value: ir.Value) -> ir.Value:
        """What ``value`` is for the new roots; what depends on them is cloned."""
        return self._substitute(value)

    def _substitute(self, value: ir.Value) -> ir.Value:
        if value not in self._substitutes:
            producer = value.producer()
            if producer is None or producer not in self._dependent:
                return value
            self._clone(producer)
        return self._substitutes[value]

    def _clone(self, node: ir.Node) -> None:
        inputs: list[ir.Value | None] = []
        for index, value in enumerate(node.inputs):
            if value is not None and value is self._shape_only:
                self._check_reads_shape(node, index)
            inputs.append(None if value is None else self._substitute(value))
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes=list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{node.name}{self._suffix}" if node.name else None,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"{old.name}{self._suffix}", old.type, old.shape
            self._substitutes[old] = new
        self.cloned.append(copy)

    def _check_reads_shape(self, node: ir.Node, index: int) -> None:
        if node.op_type == "Shape" or reads_dtype(node, index):
            return
        source = self._shape_only.name if self._shape_only is not None else "the token states"
        raise GraphError(
            f"{node.op_type} ({node.name}) feeds later layers with values computed from {source} "
            "outside the layers; the selection can only re-derive positions, masks and shapes, so this model needs "
            "a rule of its own"
        )
