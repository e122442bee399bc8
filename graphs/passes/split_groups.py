"""Every layer becomes a cache group of its own, so that layers may hold different numbers of entries."""

from __future__ import annotations

import onnx_ir as ir

from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input
from vlmtrim.graphs.surgery.region import SideInputs
from vlmtrim.graphs.surgery.split import drop_unused, rename_dims


def split_groups(model: ir.Model) -> ir.Model:
    """Give each layer inputs ``write_indices.L`` and ``key_positions.L`` of its own, in place, and return the model.

    Only the mask, the ends of the live window and the write index are derived anew: queries and keys, whose shapes may
    be read off the old inputs, stay what they are. The last layer of a group takes over the group's inputs, since a
    selection behind it reads its mask.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, with or without a selection.
    """
    layers = find_layers(model)
    last = {layer.write_indices: layer.index for layer in layers}
    own: dict[int, tuple[ir.Value, ir.Value]] = {}
    cloned: list[ir.Node] = []
    for layer in layers:
        group = layer.write_indices, graph_input(model, str(layer.write_indices.name).replace(*_NAMES))
        own[layer.index] = group
        if last[layer.write_indices] != layer.index:
            own[layer.index] = _inputs(layer.index)
            cloned += _derive(layer, group, own[layer.index])
    model.graph.extend(cloned)
    drop_unused(model)
    taken = {str(own[index][1].name): index for index in last.values()}
    names = {name.replace("key_positions.", "W"): f"{_OWN}{index}" for name, index in taken.items()}
    for node in model.graph:
        rename_dims(node, names)
    for index, (write, window) in own.items():
        write.name, window.name = f"write_indices.{index}", f"key_positions.{index}"
        window.shape = ir.Shape((f"W{index}",))
    for node in model.graph:
        rename_dims(node, {f"{_OWN}{index}": f"W{index}" for index in own})
    caches = [value for layer in layers for value in (*own[layer.index], layer.key_cache, layer.value_cache)]
    model.graph.inputs[:] = [value for value in model.graph.inputs if value not in set(caches)] + caches
    model.graph.sort()
    return model


_NAMES = "write_indices", "key_positions"
_OWN = "Wof"  # while names of groups and of layers would be the same


def _inputs(index: int) -> tuple[ir.Value, ir.Value]:
    write = ir.val(f"write_indices.{index}/own", dtype=ir.DataType.INT64, shape=("B",))
    return write, ir.val(f"key_positions.{index}/own", dtype=ir.DataType.INT64, shape=(f"{_OWN}{index}",))


def _derive(layer: Layer, group: tuple[ir.Value, ir.Value], own: tuple[ir.Value, ir.Value]) -> list[ir.Node]:
    """Let a layer read its own inputs; returns the nodes that are new."""
    side = SideInputs(dict(zip(group, own, strict=True)), shape_only=None, suffix=f".own{layer.index}")
    layer.attention.replace_input_with(3, side.derive(layer.mask))
    between: list[ir.Node] = []
    for value, update in ((layer.key, layer.key_update), (layer.value, layer.value_update)):
        update.replace_input_with(2, own[0])
        node = value.producer()
        while node is not None and node is not update:
            between.append(node)
            for index, read in enumerate(node.inputs):
                if index and read is not None:
                    node.replace_input_with(index, side.derive(read))
            node = None if node.inputs[0] is None else node.inputs[0].producer()
    name = str(group[1].name).replace("key_positions.", "W")
    for node in [*between, *side.cloned]:
        rename_dims(node, {name: f"{_OWN}{layer.index}"})
    return side.cloned
