"""What a step's tokens see is told apart from where they are written, so that an answer can go round in its caches."""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.surgery.anatomy import find_layers
from vlmtrim.graphs.surgery.region import SideInputs
from vlmtrim.graphs.surgery.split import drop_unused


def query_limits(model: ir.Model) -> ir.Model:
    """Add an input ``query_limits.g`` int64 [B] a cache group, in place, and return the model.

    It is the last slot that the step's first token sees; the masks read it in place of ``write_indices.g``. Where both
    are equal nothing changes.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, with or without a selection.
    """
    sides: dict[ir.Value, SideInputs] = {}
    for layer in find_layers(model):
        write = layer.write_indices
        if write not in sides:
            group = str(write.name).rpartition(".")[2]
            limit = ir.val(f"query_limits.{group}", dtype=ir.DataType.INT64, shape=("B",))
            sides[write] = SideInputs({write: limit}, shape_only=None, suffix=f".limit{group}")
            window = next(value for value in model.graph.inputs if value.name == f"key_positions.{group}")
            model.graph.inputs.insert(model.graph.inputs.index(window) + 1, limit)
        layer.attention.replace_input_with(3, sides[write].derive(layer.mask))
    model.graph.extend([node for side in sides.values() for node in side.cloned])
    drop_unused(model)
    model.graph.sort()
    return model
