"""A vision graph that another exporter wrote, with our contract's boundary.

mobius-onnx, transformers.js, onnxruntime-genai and ``torch.onnx.export`` write pixel_values [I, 3, H, W] ->
image_features, [I, P, D] or one picture's behind the other's, [I * P, D]. It is taken where the family's own graph has
that boundary: each picture one square. Whether it computes what the checkpoint does, check-vlm says.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import rank
from vlmtrim.graphs.foreign.nodes import kind, size
from vlmtrim.graphs.foreign.parts import checked, infer, listed, opened, returned
from vlmtrim.graphs.foreign.whole import reinfer
from vlmtrim.graphs.ops import Ops

_LAID_OUT = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})  # numbers stay in their order


def own_vision(model: ir.Model, spec: GraphSpec) -> ir.Model:
    """Rewrite a vision graph in place, and return it with the boundary ``spec``.

    Raises:
        GraphError: the family's pictures are no such squares, or the graph is for others; the message says what was
            expected and what was found.
    """
    wanted, features = spec.inputs[0], spec.outputs[0]
    if len(spec.inputs) != 1 or len(wanted.shape) != 4 or len(features.shape) != 3:
        given = listed(tensor.name for tensor in spec.inputs)
        raise GraphError(
            f"this family's pictures are no squares that become features one by one: its own vision graph takes "
            f"{given} and returns {features.name} {list(features.shape)}; leave --vision out"
        )
    inputs = opened(model)
    if len(inputs) != 1:
        raise GraphError(f"expected the input pixel_values alone; found {listed(inputs)}")
    pixels = _pixels(next(iter(inputs.values())), spec)
    infer(model)
    found = checked(returned(model, features.name), features)
    ops = Ops("own")
    result = _features(ops, _before_layout(found), pixels, spec)
    result.type, result.shape, result.name = found.type, ir.Shape(features.shape), features.name
    if found is not result:
        found.name = f"{features.name}.before"
    model.graph.extend(ops.nodes)
    model.graph.inputs[:], model.graph.outputs[:] = [pixels], [result]
    RemoveUnusedNodesPass()(model)
    outer = {pixels, result, *model.graph.initializers.values()}
    reinfer(model, outer, frozenset(dim for dim in wanted.shape if isinstance(dim, str)))
    return model


def _pixels(pixels: ir.Value, spec: GraphSpec) -> ir.Value:
    """The input under the contract's name and dimensions. Raises GraphError where it is for other pictures."""
    wanted = spec.inputs[0]
    if rank(pixels) != 4:
        raise GraphError(f"expected the input pixel_values [I, 3, H, W]; found {pixels.name} {pixels.shape}")
    checked(pixels, wanted)
    if size(pixels, 0) is not None:
        raise GraphError(
            f"expected any number of pictures in {pixels.name} {list(wanted.shape)}; found {pixels.shape}: export with "
            "a dynamic first dimension"
        )
    if any(size(pixels, axis) not in (None, wanted.shape[axis]) for axis in (1, 2, 3)):
        raise GraphError(f"expected pictures {list(wanted.shape)}, as the checkpoint has them; found {pixels.shape}")
    pixels.name, pixels.shape = wanted.name, ir.Shape(wanted.shape)
    return pixels


def _before_layout(value: ir.Value) -> ir.Value:
    """The value that holds the same numbers in the same order before they were laid out."""
    node = value.producer()
    while node is not None and kind(node)[0] == "" and node.op_type in _LAID_OUT and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _features(ops: Ops, value: ir.Value, pixels: ir.Value, spec: GraphSpec) -> ir.Value:
    """``value`` as [I, P, D]. Raises GraphError where it is known to be something else."""
    _, tokens, width = spec.outputs[0].shape
    known = size(value, 1) if rank(value) == 3 else tokens
    if size(value, 0) is not None:
        raise GraphError(f"expected features of as many pictures as come in; found {value.shape}, of a fixed number")
    if size(value, -1) not in (None, width) or known not in (None, tokens) or rank(value) == 1:
        raise GraphError(
            f"expected {tokens} features of width {width} for a picture, as the checkpoint has them; found "
            f"{value.shape}"
        )
    # By the number of pictures: features of another number of tokens, where none is known, cannot pass for them.
    shape = ops.concat(ops.dim(pixels, 0), ops.const([tokens]), ops.const([width]))
    return ops("Reshape", value, shape)
