"""The last layer computes only what the logits need: queries, MLP and norms of each row's last token.

Keys and values of every token are still written, since later tokens attend to them. The arithmetic of what remains is
unchanged; about one part in ``layers`` of a prefill is saved, and a decode step, which has one token, stays as it is.
Applied to the plain decoder, before a selection, which then re-derives these nodes as all others of later layers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlmtrim.graphs.contract import DEEPSTACK, LAST_SEEN
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.anatomy import find_layers, graph_input, graph_output, seam_before
from vlmtrim.graphs.surgery.region import SideInputs, downstream, upstream
from vlmtrim.graphs.surgery.split import rename_dims

SUFFIX = ".last"  # of names of what is derived for the last row
_ALONG = ("axis", "batch_dims")  # what says of a gather that it runs along the tokens


def last_row(model: ir.Model) -> ir.Model:
    """Rewrite the last layer of a plain decoder in place, and return it.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, no selection yet.

    Raises:
        GraphError: the decoder does not pick each row's last token behind its last layer in the way that is known.
    """
    layers = find_layers(model)
    layer, last_index = layers[-1], graph_input(model, "last_index")
    embeds = graph_input(model, "inputs_embeds")
    seam = seam_before(model, layers, layer.index) if layer.index else embeds
    pick = _pick(model, seam, last_index)
    written = upstream(layer.key) | upstream(layer.value)
    later = downstream(seam) & upstream(graph_output(model, "logits"))
    region = [node for node in model.graph if node in later - written]

    ops = Ops("last")
    index = ops("Unsqueeze", last_index, ops.const([1]))
    row = _row(ops, seam, index)
    roots = {layer.key: layer.key, layer.value: layer.value, seam: row, embeds: row}  # what is read of the caches stays
    if not layer.crosses:  # a query's place in the caches is that of the last token
        roots[layer.write_indices] = ops("Add", layer.write_indices, last_index)
    for name, axis in (("position_ids", -1), ("seen_images", 1), (DEEPSTACK, 1)):
        value = next((v for v in model.graph.inputs if v.name == name), None)
        if value is not None:
            roots[value] = _of_last(ops, value, index, axis)
    seen = next((v for v in model.graph.inputs if v.name == LAST_SEEN), None)
    if seen is not None:  # of the only token, which is the last one and so sees none behind it
        roots[seen] = ops("Sub", index, index)
        roots[seen].type, roots[seen].shape = seen.type, ir.Shape(("B", 1))
    side = SideInputs(roots, shape_only=None if seam is embeds else embeds, suffix=SUFFIX)
    side.rewire(region)

    picked = pick.inputs[0]
    assert picked is not None
    if pick.op_type == "GatherND":  # [B, D], without the axis of tokens
        picked = ops("Squeeze", picked, ops.const([1]))
        picked.type, picked.shape = pick.outputs[0].type, pick.outputs[0].shape
    pick.outputs[0].replace_all_uses_with(picked)
    for node in [*region, *side.cloned]:
        rename_dims(node, {"S": 1})
    model.graph.extend([*ops.nodes, *side.cloned])
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return model


def _row(ops: Ops, states: ir.Value, index: ir.Value) -> ir.Value:
    """``states`` [B, S, D] at ``index`` [B, 1] -> [B, 1, D].

    A sum in which all others are zero: where a selection has gathered the states, TensorRT-RTX 1.7 does not build every
    decoder that gathers of them once more ("is_const").
    """
    number = ops("Range", ops.const(0), ops("Squeeze", ops.dim(states, 1), ops.const([0])), ops.const(1))
    here = ops("Unsqueeze", ops("Equal", number, index), ops.const([2]))  # [B, S, 1]
    others = ops("CastLike", ops.const(0.0, np.float32), states)
    row = ops("ReduceSum", ops("Where", here, states, others), ops.const([1]), keepdims=1)
    batch, _, width = states.shape or ("B", "S", None)
    row.type, row.shape = states.type, ir.Shape((batch, 1, width))
    return row


def _of_last(ops: Ops, value: ir.Value, index: ir.Value, axis: int) -> ir.Value:
    """``value`` at each row's last token: along ``axis``, S becomes 1; [.., B, S] or [B, S, n]."""
    dims = list(value.shape or ())
    axis %= len(dims)
    sizes = [ops.const([1]) if i == axis else ops.dim(value, i) for i in range(len(dims))]
    if axis < len(dims) - 1:
        index = ops("Unsqueeze", index, ops.const(list(range(2, len(dims)))))
    picked = ops("GatherElements", value, ops("Expand", index, ops.concat(*sizes)), axis=axis)
    picked.type, picked.shape = value.type, ir.Shape([1 if i == axis else dim for i, dim in enumerate(dims)])
    return picked


def _pick(model: ir.Model, seam: ir.Value, last_index: ir.Value) -> ir.Node:
    """The node that takes each row's last token behind the last layer."""
    states, by_index = downstream(seam), downstream(last_index)
    found = [
        node
        for node in states & by_index
        if node.op_type.startswith("Gather") and node.inputs[1] is not None and node.inputs[1].producer() in by_index
        if node.inputs[0] is not None and node.inputs[0].producer() in states
    ]
    along = [(node.op_type, a.as_int()) for node in found for a in node.attributes.values() if a.name in _ALONG]
    if along not in ([("GatherElements", 1)], [("GatherND", 1)]):
        kinds = ", ".join(node.op_type for node in found) or "none"
        raise GraphError(
            "expected one GatherElements or GatherND along the tokens that takes last_index behind the last layer; "
            f"found: {kinds}"
        )
    return found[0]
