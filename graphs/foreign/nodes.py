"""Reading nodes of a stranger: attributes and shapes that may be anything, names for messages."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError

MICROSOFT = "com.microsoft"


def kind(node: ir.Node) -> tuple[str, str]:
    """(domain, operator), the standard domain as an empty text."""
    return ("" if node.domain == "ai.onnx" else node.domain), node.op_type


def said(node: ir.Node | None) -> str:
    """A node for a message: operator and name, or what it returns where it has none."""
    if node is None:
        return "an input or a constant"
    named = node.name or next((value.name for value in node.outputs if value.name), None)
    operator = node.op_type if kind(node)[0] == "" else f"{node.domain}.{node.op_type}"
    return f"{operator} ({named})" if named else operator


def number(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is an int or a float. Raises GraphError where it is something else."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type not in (ir.AttributeType.INT, ir.AttributeType.FLOAT):
        raise GraphError(f"expected a number as {name} of {said(node)}; found {attribute.type.name}")
    return attribute.value


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, None where it has none there."""
    return node.inputs[index] if index < len(node.inputs) else None


def result(node: ir.Node, index: int) -> ir.Value | None:
    """An output of a node, None where it has none there."""
    return node.outputs[index] if index < len(node.outputs) else None


def size(value: ir.Value | None, axis: int) -> int | None:
    """A fixed size of a value; None where it is not fixed or not known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) and dim > 0 else None


def part_of_shape(node: ir.Node, rank: int) -> slice:
    """Which dimensions of its input's ``rank`` a Shape returns."""
    return slice(int(number(node, "start", 0)), int(number(node, "end", rank)))


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A small constant; None where the value is none, or large."""
    if value is None:
        return None
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None and kind(node) == ("", "Constant"):
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > 64:
        return None
    return tensor.numpy()


def followed(value: ir.Value, through: frozenset[str]) -> list[tuple[ir.Node, int]]:
    """Readers of a value, seen through standard operators of those names, in order, with the input they read it by.

    A Concat of one value changes nothing; traces of empty caches hold some.
    """
    found: dict[tuple[ir.Node, int], None] = {}
    seen, stack = {value}, [value]
    while stack:
        for node, index in stack.pop().uses():
            domain, operator = kind(node)
            if domain == "" and (operator in through or (operator == "Concat" and len(node.inputs) == 1)):
                stack += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            else:
                found[node, index] = None
    return list(found)
