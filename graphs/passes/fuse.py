"""Root mean square norms and rotary embeddings as the one operator that each of them is.

Traced models spell both out in elementary operators; ONNX has ``RMSNormalization`` and ``RotaryEmbedding`` since opset
23, which runtimes have kernels for. A fusion that silently fires less often than before costs speed without a trace,
so every pass reports how often it fired and why it did not where it nearly did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.errors import GraphError


@dataclass
class Fired:
    """How often a fusion fired, and what kept it from firing elsewhere."""

    count: int = 0
    misses: list[str] = field(default_factory=list)


class Miss(Exception):
    """A place that looks like the pattern and is not; the message says what differs."""


def fuse(model: ir.Model, expected: Mapping[str, int]) -> None:
    """Fuse in place every operator that ``expected`` names, and nothing else.

    Args:
        model: a traced graph whose constants are folded.
        expected: operator (``RMSNormalization``, ``RotaryEmbedding``) -> how often the model's layers hold it.

    Raises:
        GraphError: a fusion fired more or less often than expected; the message names the nearest miss.
    """
    for operator, count in expected.items():
        fired = FUSIONS[operator](model)
        if fired.count != count:
            nearest = f"; the nearest miss: {fired.misses[0]}" if fired.misses else ""
            raise GraphError(
                f"{operator} was recognised {fired.count} times, the model's layers hold {count}{nearest}: this "
                "version of transformers spells it in a way that vlmtrim does not know yet"
            )
    RemoveUnusedNodesPass()(model)


def fuse_rms_norm(model: ir.Model) -> Fired:
    """``w * cast(x32 * rsqrt(mean(x32 ** 2) + eps))`` with ``x32 = float32(x)`` -> RMSNormalization(x, w).

    Where weights are float32 as the norm is, and what is scaled is cast behind them: RMSNormalization(x32, w).
    """
    return _each(model, "ReduceMean", _rms_norm)


def fuse_rotary(model: ir.Model) -> Fired:
    """``x * cos + concat(-x[half:], x[:half]) * sin`` -> RotaryEmbedding(x, cos[:half], sin[:half]).

    ``x`` is [B, H, S, Dh]; ``cos`` and ``sin`` [B, 1, S, Dh] repeat their first half, as transformers computes them.
    """
    halves: dict[ir.Value, ir.Value] = {}
    return _each(model, "Neg", lambda node: _rotary(node, halves))


FUSIONS = {"RMSNormalization": fuse_rms_norm, "RotaryEmbedding": fuse_rotary}


def _each(model: ir.Model, anchor: str, rewrite: Callable[[ir.Node], None]) -> Fired:
    fired = Fired()
    for node in [node for node in model.graph if node.op_type == anchor]:
        try:
            rewrite(node)
            fired.count += 1
        except Miss as miss:
            fired.misses.append(f"{node.name or node.outputs[0].name}: {miss}")
    return fired


def _rms_norm(mean: ir.Node) -> None:
    wide, squares = _input(mean, 0), _input(mean, 0).producer()
    if squares is None or squares.op_type not in ("Pow", "Mul"):
        raise Miss(f"the mean is taken of {wide.name}, which is no square")
    wide = _input(squares, 0)
    if squares.op_type == "Pow" and _scalar(_input(squares, 1)) != 2:
        raise Miss(f"the exponent is {_scalar(_input(squares, 1))}, not 2")
    if squares.op_type == "Mul" and _input(squares, 1) is not wide:
        raise Miss("the product is not of a value with itself")
    axes = _constant(_input(mean, 1))
    if axes is None or list(axes.flatten()) not in ([-1], [len(wide.shape or ()) - 1]):
        raise Miss("the mean is not over the last axis alone")
    add = _only_reader(mean.outputs[0], "Add")
    epsilon = _scalar(_other(add, mean.outputs[0]))
    root = _only_reader(add.outputs[0], "Sqrt")
    inverse = _only_reader(root.outputs[0], "Reciprocal")
    normal = _only_reader(inverse.outputs[0], "Mul")
    if _other(normal, inverse.outputs[0]) is not wide:
        raise Miss("what is scaled is not what was squared")
    if wide.dtype != ir.DataType.FLOAT:
        raise Miss(f"it is computed in {wide.dtype}, not in float32")
    source = wide.producer()
    narrow = _input(source, 0) if source is not None and source.op_type == "Cast" else wide
    scaled = normal.outputs[0]
    reader = _only_reader(scaled, "Cast", "Mul")
    if reader.op_type == "Cast":
        scaled = reader.outputs[0]
        reader = _only_reader(scaled, "Mul")
    weight = _other(reader, scaled)
    if weight.shape is None or len(weight.shape) != 1:
        raise Miss(f"{weight.name} is no vector of weights")
    if weight.dtype == wide.dtype and scaled is normal.outputs[0]:
        narrow = wide
    if weight.dtype != narrow.dtype:
        raise Miss(f"the weights are {weight.dtype}, the input is {narrow.dtype}")
    _replace(
        reader,
        "RMSNormalization",
        [narrow, weight],
        {"axis": -1, "epsilon": epsilon, "stash_type": int(ir.DataType.FLOAT)},
    )


def _rotary(negated: ir.Node, halves: dict[ir.Value, ir.Value]) -> None:
    x, half, size = _sliced(negated)
    turned = _only_reader(negated.outputs[0], "Concat")
    first = _input(turned, 1).producer()
    if len(turned.inputs) != 2 or _input(turned, 0) is not negated.outputs[0] or first is None:
        raise Miss("it is not joined as (-second half, first half)")
    if first.op_type != "Slice" or _input(first, 0) is not x or _bounds(first) != (0, half):
        raise Miss("the other half is not the first half of the same value")
    if 2 * half != size:
        raise Miss(f"{half} of {size} channels are rotated; only whole heads are supported")
    by_sine = _only_reader(turned.outputs[0], "Mul")
    total = _only_reader(by_sine.outputs[0], "Add")
    by_cosine = _other(total, by_sine.outputs[0]).producer()
    if by_cosine is None or by_cosine.op_type != "Mul":
        raise Miss("what is added is no product with the cosines")
    tables = [_table(_other(by_cosine, x)), _table(_other(by_sine, turned.outputs[0]))]
    for table in tables:
        if table not in halves:
            halves[table] = _first_half(table, half)
    _replace(total, "RotaryEmbedding", [x, *(halves[table] for table in tables)], {})


def _sliced(negated: ir.Node) -> tuple[ir.Value, int, int]:
    """(value, start, size) of the slice along the last axis that is negated."""
    node = _input(negated, 0).producer()
    if node is None or node.op_type != "Slice":
        raise Miss("what is negated is no slice")
    x = _input(node, 0)
    size = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(size, int):
        raise Miss(f"{x.name} has shape {x.shape}, not [B, H, S, Dh] with a fixed Dh")
    start, end = _bounds(node)
    if end < size:
        raise Miss(f"the slice ends at {end} of {size}")
    return x, start, size


def _bounds(node: ir.Node) -> tuple[int, int]:
    """Start and end of a Slice along the last axis with step 1."""
    parts = [None if value is None else _constant(value) for value in node.inputs[1:]]
    if any(part is None or part.size != 1 for part in parts) or len(parts) < 3:
        raise Miss(f"{node.name} slices by values that are not constant")
    start, end, axis, *step = (int(part.item()) for part in parts if part is not None)
    if axis not in (-1, 3) or step not in ([], [1]):
        raise Miss(f"{node.name} slices axis {axis} with step {step}")
    return start, end


def _table(value: ir.Value) -> ir.Value:
    """The [B, S, Dh] behind a table that was unsqueezed to [B, 1, S, Dh]."""
    node = value.producer()
    axis = None if node is None or node.op_type != "Unsqueeze" else _constant(_input(node, 1))
    if node is None or axis is None or list(axis.flatten()) != [1]:
        raise Miss(f"{value.name} is not unsqueezed at axis 1")
    return _input(node, 0)


def _first_half(table: ir.Value, half: int) -> ir.Value:
    graph, producer = table.graph, table.producer()
    assert graph is not None and producer is not None
    bounds = [ir.node("Constant", [], attributes={"value_ints": [number]}) for number in (0, half, 2)]
    for name, node in zip(("start", "end", "axis"), bounds, strict=True):
        node.outputs[0].name = f"{table.name}/half_{name}"
    cut = ir.node("Slice", [table, *(node.outputs[0] for node in bounds)], name=f"{table.name}/half")
    cut.outputs[0].name = f"{table.name}/half"
    cut.outputs[0].type = table.type
    if table.shape is not None:
        cut.outputs[0].shape = ir.Shape((*list(table.shape)[:-1], half))
    graph.insert_after(producer, [*bounds, cut])
    return cut.outputs[0]


def _replace(last: ir.Node, operator: str, inputs: list[ir.Value], attributes: dict) -> None:
    """Put one node in the place of ``last``, whose result it computes; what fed ``last`` falls away later."""
    old = last.outputs[0]
    node = ir.node(operator, inputs, attributes=attributes, name=f"{last.name or old.name}/{operator}")
    node.metadata_props.update(last.metadata_props)
    new = node.outputs[0]
    new.name, new.type, new.shape = f"{old.name}/{operator}", old.type, old.shape
    graph = last.graph
    assert graph is not None
    graph.insert_after(last, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(last, safe=True)


def _input(node: ir.Node | None, index: int) -> ir.Value:
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    if value is None:
        raise Miss(f"{node.op_type if node else 'a graph input'} has no input {index}")
    return value


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    """The operand of a two-operand node that is not ``value``."""
    first, second = _input(node, 0), _input(node, 1)
    if value not in (first, second):
        raise Miss(f"{node.op_type} ({node.name}) does not read {value.name}")
    return second if first is value else first


def _only_reader(value: ir.Value, *operators: str) -> ir.Node:
    readers = [node for node, _ in value.uses()]
    if len(readers) != 1 or readers[0].op_type not in operators:
        found = ", ".join(node.op_type for node in readers) or "nothing"
        raise Miss(f"{value.name} is read by {found}; expected one {' or '.join(operators)}")
    return readers[0]


def _constant(value: ir.Value):
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _scalar(value: ir.Value) -> float:
    array = _constant(value)
    if array is None or array.size != 1:
        raise Miss(f"{value.name} is no constant number")
    return float(array.item())
