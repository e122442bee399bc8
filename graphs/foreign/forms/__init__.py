"""Forms in which exporters write attention with a cache: one module a form.

A form's module has READS, the operators by which it reads the past keys, and ``match(index, node, cache)``, which
returns a :class:`Form` of layer ``index``, or None where the node is of another form; near misses raise GraphError with
the layer, what was expected and what was found.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import Boundary, Cache, recognise
from vlmtrim.graphs.foreign.nodes import followed, kind, said
from vlmtrim.graphs.foreign.trial import Trial
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.attention import Rows

# What reads of a cache nothing but its size.
SIZES = frozenset({"Shape", "Size"})
_UNCHANGED = frozenset({"Identity", "Cast"})


@dataclass(frozen=True)
class Operands:
    """What causal attention takes: queries [B, H, S, Dh], keys and values [B, KV, S, Dh] of this step.

    Attributes:
        scale: the factor on products of queries and keys.
        heads: H.
        width: Dh.
        joined: all keys and all values [B, KV, T, Dh], where a node beside the attention makes them.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    heads: int
    width: int
    joined: tuple[ir.Value, ...] = ()


class Form(Protocol):
    """Attention of one layer.

    Attributes:
        index: number of the layer.
        node: its attention, or the softmax where that is written out.
        output: what depends on every token that the layer attends to.
        positions: whether it works out positions by itself, from the length of its cache.
    """

    index: int
    node: ir.Node
    output: ir.Value
    positions: bool

    def rows(self, boundary: Boundary) -> Rows:
        """What rules read of it. Raises GraphError where that cannot be computed."""
        ...

    def place(self, ops: Ops, positions: ir.Value) -> None:
        """Make it work at the given positions int64 [B, S] where it works them out by itself."""
        ...

    def operands(self, ops: Ops, positions: ir.Value, steps: tuple[Trial, ...]) -> Operands:
        """What it attends with. ``steps`` are those that it is tried in. Raises GraphError where it is no causal
        attention to all tokens, or to those of the steps' window."""
        ...

    def put(self, ops: Ops, attended: ir.Value) -> None:
        """Let ``attended`` [B, H, S, Dh] be what it returns."""
        ...


def find_layers(boundary: Boundary) -> list[Form]:
    """The attention of every layer. Raises GraphError naming the first layer that has none of a known form."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [_find(index, cache, modules) for index, cache in enumerate(boundary.caches)]


def opened(model: ir.Model) -> tuple[Boundary, list[Form]]:
    """The boundary and the layers; functions are opened where layers lie in some."""
    boundary = recognise(model)
    try:
        return boundary, find_layers(boundary)
    except GraphError:
        if not model.functions:
            raise
        InlinePass()(model)
        boundary = recognise(model)
        return boundary, find_layers(boundary)


def _find(index: int, cache: Cache, modules: list) -> Form:
    readers = [(node, at) for node, at in followed(cache.key, _UNCHANGED) if node.op_type not in SIZES]
    for node, _ in readers:
        for module in modules:
            if kind(node) in module.READS and (form := module.match(index, node, cache)) is not None:
                return form
    wanted = sorted({operator for module in modules for _, operator in module.READS})
    found = ", ".join(said(node) for node, _ in readers[:4]) or "nothing"
    raise GraphError(f"layer {index}: expected {cache.key.name} to be read by {' or '.join(wanted)}; found {found}")
