"""From the boundary that exporters share to our contract's: caches of fixed capacity that are written in place.

What changes: keys and values go into the caches by TensorScatter, the mask follows from where they go, logits are of
each row's last token, operators of ONNX Runtime become standard ones. Padding is on the right then, as in every bundle.
A decoder of Gemma 3 is causal in pictures too where others export it; the contract's mask, which lets their tokens see
each other both ways as the checkpoint does, stands in its stead.
Methods, backends and engines take the result as one of export-vlm's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.contract import LAST_SEEN, cache_names
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import Boundary, Cache
from vlmtrim.graphs.foreign.forms import Form, Operands, opened
from vlmtrim.graphs.foreign.nodes import constant, kind, operand, part_of_shape, said, size
from vlmtrim.graphs.foreign.opset import OPSET, raised
from vlmtrim.graphs.foreign.standard import check_unpacked, standardise
from vlmtrim.graphs.foreign.trial import sizes_off_tokens, trials
from vlmtrim.graphs.foreign.whole import check_produced, check_subgraphs, infer_missing, reinfer
from vlmtrim.graphs.ops import Ops

_BY_TOKEN = frozenset({"Cast", "Identity", "Mul", "Div", "Tanh"})  # between the last product and the logits


def own_form(model: ir.Model, capacity: int, windows: Sequence[int] = (), sees_ahead: bool = False) -> ir.Model:
    """Rewrite a decoder with the boundary of :mod:`.boundary` in place, and return it with that of the contract.

    Args:
        model: takes ``inputs_embeds``; causal attention, in any of the forms; no selection yet.
        capacity: of the caches, in tokens.
        windows: tokens that each layer of the checkpoint sees, 0 for all; empty where all layers see all.
        sees_ahead: whether visual tokens attend to those of their picture that are behind them.

    Raises:
        GraphError: it is of another form; the message names the layer, what was expected and what was found.
    """
    check_produced(model)
    check_unpacked(model)
    raised(model, OPSET)
    boundary, layers = opened(model)
    check_subgraphs(model, boundary)
    if not boundary.embedded:
        raise GraphError("expected inputs_embeds, into which image features are merged; found input_ids")
    infer_missing(model)
    dtype = boundary.tokens.dtype
    assert dtype is not None
    seen = windows or [0] * len(layers)
    steps = {window: trials(model, boundary, capacity, window) for window in dict.fromkeys(seen)}
    inputs = _Inputs(boundary, sees_ahead)
    ops = Ops("own")
    masks = {window: _mask(ops, inputs, dtype, window) for window in steps}
    operands = [layer.operands(ops, inputs.positions, steps[w]) for layer, w in zip(layers, seen, strict=True)]
    sizes_off_tokens(ops, steps[seen[0]], boundary.tokens, [value for given in operands for value in given.joined])
    for cache, given in zip(boundary.caches, operands, strict=True):
        inputs.hold(cache, given.width, capacity)
    queries = [
        _attend(ops, layer, cache, given, inputs, masks[window])
        for layer, cache, given, window in zip(layers, boundary.caches, operands, seen, strict=True)
    ]
    _last_row(ops, boundary, inputs.last_index)
    model.graph.extend(ops.nodes)
    model.graph.inputs[:] = inputs.ordered(boundary.caches)
    returned = {value.name: value for value in model.graph.outputs}
    caches = [returned[name] for layer in range(len(layers)) for _, name in cache_names(layer)]
    model.graph.outputs[:] = [boundary.logits, *caches]
    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    _check_caches(model, boundary)
    standardise(model)
    _tidy(model, boundary, queries)
    return model


class _Inputs:
    """The boundary's inputs: those that stay, under the contract's names of dimensions, and those that come."""

    def __init__(self, boundary: Boundary, sees_ahead: bool):
        self.tokens = boundary.tokens
        self.tokens.shape = ir.Shape(("B", "S", size(boundary.tokens, 2)))
        positions = boundary.positions
        if positions is None:
            positions = ir.val("position_ids", dtype=ir.DataType.INT64, shape=("B", "S"))
        axes = list(positions.shape or ())[:-2]
        positions.shape = ir.Shape((*axes, "B", "S"))
        self.positions = positions
        self.last_index = ir.val("last_index", dtype=ir.DataType.INT64, shape=("B",))
        self.last_seen = ir.val(LAST_SEEN, dtype=ir.DataType.INT64, shape=("B", "S")) if sees_ahead else None
        self.write_indices = ir.val("write_indices.0", dtype=ir.DataType.INT64, shape=("B",))
        self.window = ir.val("key_positions.0", dtype=ir.DataType.INT64, shape=("W0",))

    def hold(self, cache: Cache, width: int, capacity: int) -> None:
        """Give a layer's caches their fixed size."""
        for value in (cache.key, cache.value):
            value.shape = ir.Shape(("B", size(value, 1), capacity, width))

    def ordered(self, caches: tuple[Cache, ...]) -> list[ir.Value]:
        """As the contract orders them."""
        first = [self.tokens, self.positions, self.last_index]
        first += [] if self.last_seen is None else [self.last_seen]
        first += [self.write_indices, self.window]
        return [*first, *(value for cache in caches for value in (cache.key, cache.value))]


def _mask(ops: Ops, inputs: _Inputs, dtype: ir.DataType, window: int) -> ir.Value:
    """What is added to the logits, [B, 1, S, W]: a token sees what was written up to itself, or to the end of its
    picture, and of that the last ``window`` entries where that is not 0."""
    step = ops("Range", ops.const(0), ops("Squeeze", ops.dim(inputs.tokens, 1), ops.const([0])), ops.const(1))
    first = ops("Unsqueeze", inputs.write_indices, ops.const([1]))
    own = ops("Add", first, step)
    last = own if inputs.last_seen is None else ops("Add", first, inputs.last_seen)
    seen = ops("LessOrEqual", inputs.window, ops("Unsqueeze", last, ops.const([1, 3])))
    if window:
        before = ops("Unsqueeze", ops("Sub", own, ops.const(window)), ops.const([1, 3]))
        seen = ops("And", seen, ops("Greater", inputs.window, before))
    low = -65504.0 if dtype == ir.DataType.FLOAT16 else -3e38
    mask = ops("Where", seen, ops.const(0.0, dtype.numpy()), ops.const(low, dtype.numpy()))
    mask.type = ir.TensorType(dtype)
    return mask


def _attend(ops: Ops, layer: Form, cache: Cache, given: Operands, inputs: _Inputs, mask: ir.Value) -> ir.Value:
    """Attention over caches that are written in place, instead of the layer's own; returns its queries."""
    live, names = [], cache_names(layer.index)
    for old, new, written, (_, name) in zip(
        (cache.key, cache.value), (cache.new_key, cache.new_value), (given.key, given.value), names, strict=True
    ):
        present = ops("TensorScatter", old, written, inputs.write_indices, axis=2)
        present.type, present.shape = old.type, old.shape
        new.replace_all_uses_with(present, replace_graph_outputs=True)
        new.name, present.name = f"{name}.before", name
        live.append(ops.slice(present, ops.const([0]), ops("Shape", inputs.window), axis=2))
    # Scaled beforehand, by a constant: TensorRT would scale the whole key cache otherwise.
    assert mask.dtype is not None
    scaled = ops("Mul", given.query, ops.const(given.scale, mask.dtype.numpy()))
    scaled.type, scaled.shape = mask.type, ir.Shape(("B", given.heads, "S", given.width))
    layer.put(ops, ops("Attention", scaled, *live, mask, scale=1.0))
    return scaled


def _check_caches(model: ir.Model, boundary: Boundary) -> None:
    """Let what reads the number of rows off a cache read it off the tokens. Raises GraphError where something depends
    on how many entries it holds, which its size no longer says."""
    written = [node for node in model.graph if node.op_type == "TensorScatter"]
    for node in (reader for update in written for reader, _ in update.outputs[0].uses()):
        if node.op_type != "Slice":
            raise GraphError(f"expected keys and values to feed attention alone; found {said(node)}")
    for value in (value for cache in boundary.caches for value in (cache.key, cache.value)):
        for node, _ in value.uses():
            if node.op_type == "TensorScatter":
                continue
            if node.op_type != "Shape" or not _reads_rows(node):
                raise GraphError(f"expected {value.name} to feed attention alone; found {said(node)}")
            node.replace_input_with(0, boundary.tokens)


def _reads_rows(shape: ir.Node) -> bool:
    """Whether of a shape nothing but the first dimension is read."""
    if part_of_shape(shape, 4) == slice(0, 1):
        return True
    readers = [node for node, _ in shape.outputs[0].uses()]
    indices = [constant(operand(node, 1)) for node in readers if kind(node) == ("", "Gather")]
    whole = part_of_shape(shape, 4) == slice(0, 4) and len(indices) == len(readers)
    return whole and all(index is not None and not index.any() for index in indices)


def _last_row(ops: Ops, boundary: Boundary, last_index: ir.Value) -> None:
    """Logits [B, V] of each row's last token: gathered in front of the last product."""
    logits = boundary.logits
    if logits.shape is None or len(logits.shape) != 3 or size(logits, 1) is not None:
        raise GraphError(f"expected logits [B, S, V] of all tokens; found {logits.shape}")
    node = logits.producer()
    while node is not None and kind(node)[0] == "" and node.op_type in _BY_TOKEN:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        raise GraphError(f"expected logits from a MatMul with the head's weights; found {said(node)}")
    # GatherElements: TensorRT-RTX 1.7 cannot build a GatherND of what a selection's GatherND has just gathered.
    states, index = node.inputs[0], ops("Unsqueeze", last_index, ops.const([1, 2]))
    shape = ops.concat(ops.dim(states, 0), ops.const([1]), ops.dim(states, 2))
    picked = ops("GatherElements", states, ops("Expand", index, shape), axis=1)
    node.replace_input_with(0, ops("Squeeze", picked, ops.const([1])))
    logits.shape = ir.Shape(("B", size(logits, 2)))


def _tidy(model: ir.Model, boundary: Boundary, queries: list[ir.Value]) -> None:
    """Names, and shapes under the new names of dimensions; those of ``queries`` are known."""
    if any(value is boundary.mask for node in model.graph for value in node.inputs):
        raise GraphError("expected attention_mask to feed attention alone; found another reader")
    outer = {*queries, *model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    reinfer(model, outer, frozenset({"B", "S", "W0"}))
