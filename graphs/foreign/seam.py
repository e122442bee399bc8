"""Where a foreign decoder is split: the values that all later layers read of the tokens."""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import Boundary, rank
from vlmtrim.graphs.foreign.forms import Form
from vlmtrim.graphs.foreign.nodes import said
from vlmtrim.graphs.surgery.region import cuts, downstream


def seam_before(model: ir.Model, boundary: Boundary, layers: list[Form], index: int) -> list[ir.Value]:
    """What enters layer ``index``, [B, S, D] each: the residual stream, last, and its norm where a node returns both.

    Raises GraphError naming the layer where some path goes around.
    """
    if index == 0:
        return [boundary.tokens]
    source, following = layers[index - 1].output, layers[index].node
    seam = None
    for values in cuts(source, boundary.logits, list(model.graph)):
        if not any(following in downstream(value) for value in values):
            break
        seam = values
    if seam is None or source in seam:
        raise GraphError(
            f"layer {index}: expected one residual stream between {said(layers[index - 1].node)} and "
            f"{said(following)}; found paths to the logits that go around every value"
        )
    for value in seam:
        known = rank(value)
        if known is not None and known != 3:
            raise GraphError(f"layer {index}: expected a residual stream [B, S, D]; found {value.shape}")
    return sorted(seam, key=lambda value: value.index() or 0)


def check_sides(boundary: Boundary, layers: list[Form], region: set[ir.Node], index: int) -> None:
    """Raise GraphError where a layer does not lie on the side of the seam that its number says."""
    for layer, cache in zip(layers, boundary.caches, strict=True):
        later = [value.producer() in region for value in (layer.output, cache.new_key, cache.new_value)]
        if later != [layer.index >= index] * 3:
            side = "behind" if layer.index >= index else "before"
            raise GraphError(
                f"layer {layer.index}: expected {said(layer.node)} and its caches {side} the entry of layer {index}; "
                "found them elsewhere: layers share caches, or their numbers are not their order"
            )
