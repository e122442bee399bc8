"""Layers of a cache group become groups of their own, so that they may hold different numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input
from vlmtrim.graphs.surgery.region import SideInputs
from vlmtrim.graphs.surgery.split import drop_unused, rename_dims, shrink_caches


def split_groups(model: ir.Model, groups: Sequence[CacheGroup]) -> ir.Model:
    """Give each group's layers inputs ``write_indices.G`` and ``key_positions.G`` and caches of its capacity, in place,
    and return the model.

    Only the mask, the ends of the live window and the write index are derived anew: queries and keys, whose shapes may
    be read off the old inputs, stay what they are. The one that holds the last layer of an old group takes over the old
    inputs, since a selection behind it reads that layer's mask.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, with or without a selection.
        groups: as the contract has them, the layers of each in one group of the graph so far.
    """
    layers = find_layers(model)
    last = {layer.write_indices: layer.index for layer in layers}
    own: list[_Group] = []
    names: dict[str, str | int] = {}
    cloned: list[ir.Node] = []
    parts = [[layers[index] for index in group.layers] for group in groups]
    for index, part in enumerate(parts):
        write = part[0].write_indices
        old = write, graph_input(model, str(write.name).replace(*_NAMES))
        number = str(write.name).rpartition(".")[2]
        for kind in _LEFT:
            names.setdefault(f"{kind}{number}", f"{kind}{_OWN}{index}")
        if last[write] in groups[index].layers:
            own.append(old)
            names[f"W{number}"] = f"W{_OWN}{index}"
            continue
        own.append(_inputs(index))
        side = SideInputs(dict(zip(old, own[-1], strict=True)), shape_only=None, suffix=f".own{index}")
        between = [node for layer in part for node in _derive(layer, side, own[-1][0])]
        for node in [*between, *side.cloned]:
            rename_dims(node, {f"W{number}": f"W{_OWN}{index}"})
        cloned += side.cloned
    model.graph.extend(cloned)
    drop_unused(model)
    for group, part in zip(groups, parts, strict=True):
        shrink_caches(part, group.capacity)
    _rename(model, own, names)
    _order(model, own, parts)
    model.graph.sort()
    return model


def _order(model: ir.Model, own: Sequence[_Group], parts: Sequence[Sequence[Layer]]) -> None:
    """Inputs and outputs group by group."""
    caches: list[ir.Value] = []
    for group, part in zip(own, parts, strict=True):
        caches += [*group, *(cache for layer in part for cache in (layer.key_cache, layer.value_cache))]
    updates = [node for part in parts for layer in part for node in (layer.key_update, layer.value_update)]
    for values, last in ((model.graph.inputs, caches), (model.graph.outputs, [n.outputs[0] for n in updates])):
        behind = set(last)
        values[:] = [value for value in values if value not in behind] + last


_Group = tuple[ir.Value, ir.Value]  # write_indices and key_positions
_NAMES = "write_indices", "key_positions"
_LEFT = "Sk", "Nk"  # tokens, and visual ones, that a selection leaves to the group of their number
_OWN = "of"  # while the numbers of old groups and of new ones would be the same


def _inputs(index: int) -> _Group:
    write = ir.val(f"write_indices.{index}/own", dtype=ir.DataType.INT64, shape=("B",))
    return write, ir.val(f"key_positions.{index}/own", dtype=ir.DataType.INT64, shape=(f"W{_OWN}{index}",))


def _derive(layer: Layer, side: SideInputs, write: ir.Value) -> list[ir.Node]:
    """Let a layer read its new group's inputs; returns the nodes between its caches and its attention."""
    layer.attention.replace_input_with(3, side.derive(layer.mask))
    between: list[ir.Node] = []
    for value, update in ((layer.key, layer.key_update), (layer.value, layer.value_update)):
        update.replace_input_with(2, write)
        node = value.producer()
        while node is not None and node is not update:
            between.append(node)
            for index, read in enumerate(node.inputs):
                if index and read is not None:
                    node.replace_input_with(index, side.derive(read))
            node = None if node.inputs[0] is None else node.inputs[0].producer()
    return between


def _rename(model: ir.Model, own: Sequence[_Group], names: dict[str, str | int]) -> None:
    """Number the new groups' inputs, and the dimensions that are named after groups; ``names``: old -> passing."""
    for node in model.graph:
        rename_dims(node, names)
    final = {f"{kind}{_OWN}{index}": f"{kind}{index}" for kind in ("W", *_LEFT) for index in range(len(own))}
    for index, (write, window) in enumerate(own):
        write.name, window.name = f"write_indices.{index}", f"key_positions.{index}"
        window.shape = ir.Shape((f"W{index}",))
    for node in model.graph:
        rename_dims(node, final)
