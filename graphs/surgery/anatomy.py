"""Finds the layers of a decoder graph and the seams between them, by dataflow alone.

A layer is an ``Attention`` node whose keys and values come out of ``TensorScatter`` updates of cache inputs (the
idiom ``vlmtrim.export`` emits: TensorScatter -> Slice to the live window -> Attention). It is a cross-attention layer
where what is written does not depend on the tokens. The seam before a layer is
the value every path from the attention of the layer before it to the logits runs through: the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.surgery.region import cut_values, downstream

# Nodes that may stand between a cache update and the Attention that reads it.
_TRANSPARENT = {"Slice", "Identity", "GatherND"}


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    query [B, H, S, Dh], key and value [B, KV, W, Dh] and mask (additive, [B, 1, S, W]) are the inputs of
    ``attention``; the caches and ``write_indices`` are graph inputs. ``key_update`` and ``value_update`` are the
    TensorScatter nodes that fill them, with image features where the layer ``crosses``, with tokens otherwise.
    """

    index: int
    attention: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    key_cache: ir.Value
    value_cache: ir.Value
    write_indices: ir.Value
    key_update: ir.Node
    value_update: ir.Node
    crosses: bool

    @property
    def scale(self) -> float:
        """Factor on Q K^T; the operator's default is 1/sqrt(Dh)."""
        attribute = self.attention.attributes.get("scale")
        if attribute is not None:
            return attribute.as_float()
        assert self.key_cache.shape is not None
        return float(self.key_cache.shape[3]) ** -0.5  # type: ignore[arg-type]


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """The graph input of that name. Raises GraphError listing the inputs there are."""
    for value in model.graph.inputs:
        if value.name == name:
            return value
    names = ", ".join(str(v.name) for v in model.graph.inputs if not str(v.name).startswith("past_key_values"))
    raise GraphError(f"the decoder has no input {name!r}; it has: {names} (see vlmtrim.graphs.contract)")


def graph_output(model: ir.Model, name: str) -> ir.Value:
    """The graph output of that name. Raises GraphError where there is none."""
    for value in model.graph.outputs:
        if value.name == name:
            return value
    raise GraphError(
        f"the decoder has no output {name!r}; it has: {', '.join(str(v.name) for v in model.graph.outputs)}"
    )


def find_layers(model: ir.Model) -> list[Layer]:
    """The decoder's layers in execution order. Raises GraphError where an Attention is not of the expected form."""
    model.graph.sort()
    attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not attentions:
        raise GraphError(
            "the graph has no Attention node (opset 23 or later), so there are no layers to prune between: "
            "export the decoder with export-vlm, or with an exporter that keeps attention fused"
        )
    if any(node.inputs[0] is None or node.inputs[0].shape is None for node in attentions):
        ShapeInferencePass()(model)  # a graph saved without inner shapes; head counts are read from them
    of_tokens = downstream(graph_input(model, "inputs_embeds"))
    return [_layer(index, node, of_tokens) for index, node in enumerate(attentions)]


def _layer(index: int, node: ir.Node, of_tokens: set[ir.Node]) -> Layer:
    where = f"attention {index} ({node.name or node.outputs[0].name})"
    query, key, value, mask = [*node.inputs, None, None, None, None][:4]
    if query is None or key is None or value is None:
        raise GraphError(f"{where} lacks a query, key or value input")
    if mask is None:
        raise GraphError(f"{where} has no attn_mask input; the score of a selection reads the causal limit from it")
    for name in ("softcap", "qk_matmul_output_mode"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value:
            raise GraphError(f"{where} has {name}={attribute.value}; selection by attention supports {name}=0")
    key_cache, write_indices, key_update = _cache_of(key, where)
    value_cache, value_write, value_update = _cache_of(value, where)
    if write_indices is not value_write:
        raise GraphError(f"{where} writes keys and values at different indices")
    new_key = key_update.inputs[1]
    crosses = new_key is not None and new_key.producer() not in of_tokens
    return Layer(
        index, node, query, key, value, mask, key_cache, value_cache, write_indices, key_update, value_update, crosses
    )


def _cache_of(value: ir.Value, where: str) -> tuple[ir.Value, ir.Value, ir.Node]:
    """(cache input, write_indices input, the node that updates the cache) behind a key or value operand."""
    source = _untouched(value)
    node = source.producer()
    if node is not None and node.op_type == "Concat" and node.inputs[0] is not None:
        # What the cache held, and all image features of the step behind it; the cache itself takes some of them.
        held = _untouched(node.inputs[0])
        node = next((user for user, _ in held.uses() if user.op_type == "TensorScatter"), node)
    if node is None or node.op_type != "TensorScatter":
        found = "a graph input" if node is None else f"{node.op_type} ({node.name})"
        raise GraphError(f"{where} reads {value.name}, which comes from {found}; expected a TensorScatter cache update")
    cache, _, indices = node.inputs
    if cache is None or indices is None or not cache.is_graph_input() or not indices.is_graph_input():
        raise GraphError(f"{where}: cache and write_indices of {node.name} must be graph inputs")
    return cache, indices, node


def _untouched(value: ir.Value) -> ir.Value:
    """Where a value comes from without being changed."""
    node = value.producer()
    while node is not None and node.op_type in _TRANSPARENT and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def unrotated(layer: Layer) -> tuple[ir.Value, ir.Value]:
    """Query [B, H, S, Dh] and key [B, KV, S, Dh] of this step before their rotary embedding.

    Raises GraphError where one of them does not come from a RotaryEmbedding.
    """
    new_key = layer.key_update.inputs[1]
    assert new_key is not None
    found = []
    for name, value in (("query", layer.query), ("key", new_key)):
        node = value.producer()
        if node is not None and node.op_type == "Mul":  # the factor on the scores
            node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), node)
        if node is None or node.op_type != "RotaryEmbedding" or node.inputs[0] is None:
            source = node.op_type if node else "a graph input"
            raise GraphError(
                f"the {name} of attention {layer.index} comes from {source}, not from a RotaryEmbedding (opset 23): "
                "the score no-rope needs the states before it; choose another score"
            )
        found.append(node.inputs[0])
    return found[0], found[1]


def before_scaling(query: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(value, scalar) whose product is the query, where the graph computes it so.

    Whoever reads queries besides the attention reads them before: TensorRT-RTX 1.7 fuses the multiplication into
    attention and cannot build the graph when the product has a second reader.
    """
    node = query.producer()
    if node is not None and node.op_type == "Mul":
        for value, factor in (node.inputs, reversed(node.inputs)):
            assert value is not None and factor is not None
            if ir.convenience.get_const_tensor(factor) is not None and not (factor.shape or ()):
                return value, factor
    return query, None


def seam_before(model: ir.Model, layers: list[Layer], index: int) -> ir.Value:
    """The residual stream on entry to layer ``index`` (>= 1), a value of shape [B, S, D]."""
    source = layers[index - 1].attention.outputs[0]
    following = layers[index].attention
    seam = None
    for value in cut_values(source, graph_output(model, "logits"), list(model.graph)):
        if following not in downstream(value):
            break
        seam = value
    if seam is None or seam is source:
        raise GraphError(
            f"no residual stream found between layer {index - 1} and layer {index}: some path from "
            f"{layers[index - 1].attention.name} to the logits goes around every candidate value"
        )
    return seam
