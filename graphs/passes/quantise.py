"""Puts ``DequantizeLinear`` between a graph's matrices and what multiplies by them.

A traced linear layer is ``MatMul(x, Transpose(w))`` or ``Gemm(x, w, b)`` with w [N, K]; it becomes
``MatMul(x, DequantizeLinear(stored))`` with what is stored [K, N], and an Add where there was a bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.formats import Array, Packing, load_format
from vlmtrim.graphs.ops import Ops

_DTYPES = {
    "int4": ir.DataType.INT4,
    "float4e2m1": ir.DataType.FLOAT4E2M1,
    "int8": ir.DataType.INT8,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
NAMES = {kind: name for name, kind in _DTYPES.items()}


def quantise(model: ir.Model, packings: Mapping[str, Packing]) -> None:
    """Let matrices be read as they are packed, in place.

    Args:
        model: a traced graph whose weights are not bound yet.
        packings: initializer of a matrix [N, K] -> how it is stored. In its place come initializers of the arrays of
            its format, ``<name>.<suffix>``.

    Raises:
        GraphError: a matrix is read by something that does not multiply by it, or the graph has none of that name.
    """
    for name, packing in packings.items():
        weight = model.graph.initializers.get(name)
        if weight is None:
            raise GraphError(f"no matrix {name} to be stored as {packing.format} in the graph")
        _quantise(model, weight, packing)
    RemoveUnusedNodesPass()(model)
    for name in packings:
        model.graph.initializers.pop(name, None)


def _quantise(model: ir.Model, weight: ir.Value, packing: Packing) -> None:
    assert weight.shape is not None and weight.dtype is not None
    outputs, inputs = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    arrays = packing.arrays(inputs, outputs, NAMES[weight.dtype])
    stored = tuple(_initializer(model, f"{weight.name}.{array.suffix}", array) for array in arrays)
    for number, reader in enumerate(_readers(weight)):
        _multiply(Ops(f"{weight.name}/{packing.format}{number or ''}"), reader, stored, packing)


def _initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    value = ir.val(name, dtype=_DTYPES[array.dtype], shape=ir.Shape(array.shape))
    model.graph.initializers.add(value)
    return value


def _readers(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by a matrix. Raises GraphError where anything else reads it."""
    found = []
    for node, _ in weight.uses():
        if node.op_type == "Transpose":
            multiply = [reader for reader, index in node.outputs[0].uses() if reader.op_type == "MatMul" and index == 1]
            if multiply and len(multiply) == len(node.outputs[0].uses()):
                found += multiply
                continue
        elif node.op_type == "Gemm" and node.inputs[1] is weight and _is_linear(node):
            found.append(node)
            continue
        raise GraphError(f"{weight.name} is read by {node.op_type} ({node.name}), which cannot read packed weights")
    return found


def _is_linear(gemm: ir.Node) -> bool:
    """Whether a Gemm is ``x w^T + b``."""
    defaults = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
    wanted = {**defaults, "transB": 1}
    given = {name: attribute.value for name, attribute in gemm.attributes.items()}
    return all(given.get(name, defaults[name]) == value for name, value in wanted.items())


def _multiply(ops: Ops, reader: ir.Node, stored: tuple[ir.Value, ...], packing: Packing) -> None:
    """Put the product by what is stored, and Add where there is a bias, in the place of ``reader``."""
    old, x, form = reader.outputs[0], reader.inputs[0], load_format(packing.format)
    assert x is not None
    if hasattr(form, "multiply"):
        new = form.multiply(ops, x, stored, packing.block)
    else:
        new = ops("MatMul", x, form.restore(ops, stored, packing.block))
    bias = reader.inputs[2] if reader.op_type == "Gemm" and len(reader.inputs) > 2 else None
    if bias is not None:
        new.type, new.shape = old.type, old.shape
        new = ops("Add", new, bias)
    new.type, new.shape = old.type, old.shape
    for node in ops.nodes:
        node.metadata_props.update(reader.metadata_props)
    graph = reader.graph
    assert graph is not None
    graph.insert_before(reader, ops.nodes)
    name, is_output = old.name, old in graph.outputs
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        old.name, new.name = f"{name}/before", name
    graph.remove(reader, safe=True)
