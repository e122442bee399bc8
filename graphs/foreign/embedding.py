"""A token embedding that another exporter wrote, with our contract's boundary.

    input_ids [B, S]                                 -> inputs_embeds [B, S, D]   optimum, transformers.js
    input_ids [B, S], image_features [F, D], [I, P, D] -> inputs_embeds [B, S, D] mobius-onnx, onnxruntime-genai

Of either the lookup is taken, with all that is done to its result before features come in (Gemma scales it). The second
form puts features where it finds image tokens, mobius-onnx counting those of each row from the first feature on, which
holds for one row. Here features come with their places, so the contract's own scatter stands in its stead, once made-up
rows have shown that the two are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import rank
from vlmtrim.graphs.foreign.evaluator import Evaluator
from vlmtrim.graphs.foreign.nodes import said, size
from vlmtrim.graphs.foreign.parts import checked, infer, listed, opened, returned
from vlmtrim.graphs.foreign.whole import reinfer
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.region import downstream, upstream

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LOOKUPS = frozenset({"Gather", "GatherND"})


class _Row(Evaluator):
    """One row of ids."""

    depends_on = "ids, embeddings and features"


def own_embedding(model: ir.Model, spec: GraphSpec, vocabulary: int, image_token: int) -> ir.Model:
    """Rewrite an embedding in place, and return it with the boundary ``spec``.

    Args:
        vocabulary: tokens of the checkpoint.
        image_token: id that stands where features come.

    Raises:
        GraphError: it is of another model, or puts features elsewhere; the message says what was expected and what
            was found.
    """
    if len(spec.inputs) != 3 or spec.inputs[1].shape[-1] != spec.outputs[0].shape[-1] or len(spec.outputs) != 1:
        given = listed(tensor.name for tensor in (*spec.inputs, *spec.outputs))
        raise GraphError(f"this family's own embedding has {given}, which those of others lack; leave --embedding out")
    inputs = opened(model)
    ids, features = _inputs(inputs)
    _name(ids, features, spec)
    infer(model)
    merged = checked(returned(model, spec.outputs[0].name), spec.outputs[0])
    embeds = merged if features is None else _text_side(ids, features, merged)
    _check_table(ids, embeds, spec, vocabulary)
    if features is not None:
        for at in _layouts(features):
            _check_merge(model, ids, features, embeds, merged, at, (image_token, vocabulary))
    return _rebuilt(model, ids, embeds, merged, spec)


def _inputs(inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value | None]:
    """(input_ids, image features). Raises GraphError where there are others."""
    ids, others = inputs.get("input_ids"), [value for name, value in inputs.items() if name != "input_ids"]
    if ids is None or len(others) > 1:
        raise GraphError(f"expected the inputs input_ids and, at most, image_features; found {listed(inputs)}")
    if rank(ids) != 2 or ids.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        raise GraphError(f"expected input_ids [B, S] of integers; found {ids.dtype} {ids.shape}")
    if any(size(ids, axis) is not None for axis in (0, 1)):
        raise GraphError(f"expected input_ids [B, S] of any size; found {ids.shape}: export with dynamic dimensions")
    if others and (rank(others[0]) not in (2, 3) or others[0].dtype not in _FLOATS):
        raise GraphError(
            f"expected {others[0].name} to be features [F, D] or [I, P, D]; found {others[0].dtype} {others[0].shape}"
        )
    return ids, others[0] if others else None


def _name(ids: ir.Value, features: ir.Value | None, spec: GraphSpec) -> None:
    """Dimensions of the inputs under the contract's names. Raises GraphError for features of another width."""
    width = spec.outputs[0].shape[-1]
    ids.shape = ir.Shape(spec.inputs[0].shape)
    if features is None:
        return
    if size(features, -1) not in (None, width):
        raise GraphError(f"expected features of width {width}, as the checkpoint has them; found {features.shape}")
    assert features.shape is not None
    features.shape = ir.Shape([*features.shape[:-1], width])


def _text_side(ids: ir.Value, features: ir.Value, merged: ir.Value) -> ir.Value:
    """The embeddings [B, S, D] of ids, into which features go. Raises GraphError where there is none, or several."""
    behind, by_ids = downstream(features), downstream(ids)
    read = {value for node in behind & upstream(merged) for value in node.inputs if value is not None}
    sides = [
        value for value in read if value.producer() in by_ids - behind and rank(value) == 3 and value.dtype in _FLOATS
    ]
    if len(sides) != 1 or merged.producer() not in behind:
        found = listed(sorted(value.name or "" for value in sides))
        raise GraphError(f"expected features to be put into embeddings [B, S, D] of input_ids; found {found}")
    return sides[0]


def _check_table(ids: ir.Value, embeds: ir.Value, spec: GraphSpec, vocabulary: int) -> None:
    """Raise GraphError where embeddings are not looked up in a table of the checkpoint's size."""
    width, of_ids = spec.outputs[0].shape[-1], downstream(ids)
    found = [
        node
        for node in upstream(embeds)
        if node.op_type in _LOOKUPS and node in of_ids and node.inputs[0] is not None and rank(node.inputs[0]) == 2
    ]
    tables = [node for node in found if node.inputs[0].producer() not in of_ids]  # type: ignore[union-attr]
    if len(tables) != 1 or rank(embeds) != 3:
        raise GraphError(f"expected input_ids to be looked up by one Gather; found {listed(map(said, tables))}")
    table = tables[0].inputs[0]
    if (size(table, 0), size(table, 1)) != (vocabulary, width) or size(embeds, 2) not in (None, width):
        raise GraphError(
            f"expected a table of {vocabulary} tokens of width {width}, as the checkpoint has them; found "
            f"{table and table.shape}"
        )


def _layouts(features: ir.Value) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Shapes of features, and rows in which their places are true: two pictures in a text, and nothing but pictures."""
    width = size(features, -1) or 1
    flat = rank(features) == 2
    tokens = 3 if flat else size(features, 1) or 3
    pictures = 2 if flat or size(features, 0) is None else size(features, 0) or 2
    picture = [True] * tokens
    shape = (pictures * tokens, width) if flat else (pictures, tokens, width)
    apart = [False, *([*picture, False] * pictures), False]
    return [(shape, np.array(apart)), (shape, np.array(picture * pictures))]


def _check_merge(
    model: ir.Model,
    ids: ir.Value,
    features: ir.Value,
    embeds: ir.Value,
    merged: ir.Value,
    at: tuple[tuple[int, ...], np.ndarray],
    tokens: tuple[int, int],
) -> None:
    """Raise GraphError where a made-up row does not come out as its embeddings with the features at their places."""
    (shape, visual), (image_token, vocabulary) = at, tokens
    random, row = np.random.default_rng(4), _Row(model)
    assert ids.dtype is not None and embeds.dtype is not None and features.dtype is not None
    words = random.integers(0, vocabulary - 1, len(visual))
    words += words >= image_token  # any token but that of pictures
    row.give(ids, np.where(visual, image_token, words)[None].astype(ids.dtype.numpy()))
    made = random.normal(size=shape).astype(features.dtype.numpy())
    row.give(features, made)
    text = random.normal(size=(1, len(visual), shape[-1])).astype(embeds.dtype.numpy())
    found = row.of(said(merged.producer()), merged, {embeds: text})
    want = text.copy()
    want[0, visual] = made.reshape(-1, shape[-1])
    if found.shape == want.shape and np.array_equal(found, want):
        return
    place = int(np.argmax((found != want).any(-1).reshape(-1))) if found.shape == want.shape else 0
    raise GraphError(
        f"expected {merged.name} to be the embeddings, with features at the tokens {image_token} in their order; found "
        f"other numbers at token {place} of a made-up row of {len(visual)}, by {said(merged.producer())}"
    )


def _rebuilt(model: ir.Model, ids: ir.Value, embeds: ir.Value, merged: ir.Value, spec: GraphSpec) -> ir.Model:
    """The lookup, and features scattered to their places."""
    ops, kinds = Ops("own"), {"int64": ir.DataType.INT64}
    taken, features, places = (
        ir.val(t.name, dtype=kinds.get(t.dtype, merged.dtype), shape=t.shape) for t in spec.inputs
    )
    if ids.dtype == ir.DataType.INT32:
        ids.replace_all_uses_with(ops("Cast", taken, to=ir.DataType.INT32))
    else:
        ids.replace_all_uses_with(taken)
    for value in (ids, embeds, merged):
        value.name = f"{value.name}.before"
    count = ops("Squeeze", ops.dim(places, 0), ops.const([0]))
    rows = ops("Unsqueeze", ops("Range", ops.const(0), count, ops.const(1)), ops.const([1]))
    rows = ops("Expand", rows, ops("Shape", places))
    index = ops("Concat", ops("Unsqueeze", rows, ops.const([2])), ops("Unsqueeze", places, ops.const([2])), axis=2)
    result = ops("ScatterND", embeds, index, features)
    returned_ = spec.outputs[0]
    result.name, result.type, result.shape = returned_.name, merged.type, ir.Shape(returned_.shape)
    model.graph.extend(ops.nodes)
    model.graph.inputs[:], model.graph.outputs[:] = [taken, features, places], [result]
    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    outer = {taken, features, places, result, *model.graph.initializers.values()}
    reinfer(model, outer, frozenset({"B", "S", "N"}))
    return model
