"""Layers of a cache group become groups of their own, so that they may hold different numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vlmtrim.graphs.surgery.anatomy import Layer, find_layers, graph_input
from vlmtrim.graphs.surgery.region import SideInputs
from vlmtrim.graphs.surgery.split import drop_unused, rename_dims


def split_groups(model: ir.Model, parts: Sequence[Sequence[int]]) -> ir.Model:
    """Give each part's layers inputs ``write_indices.P`` and ``key_positions.P``, in place, and return the model.

    Only the mask, the ends of the live window and the write index are derived anew: queries and keys, whose shapes may
    be read off the old inputs, stay what they are. The part that holds the last layer of a group takes over the group's
    inputs, since a selection behind it reads that layer's mask.

    Args:
        model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, with or without a selection.
        parts: layers of each new group, all of them of one old group; together every layer once.
    """
    layers = find_layers(model)
    last = {layer.write_indices: layer.index for layer in layers}
    own: list[_Group] = []
    names: dict[str, str | int] = {}
    cloned: list[ir.Node] = []
    for index, part in enumerate(parts):
        write = layers[part[0]].write_indices
        group = write, graph_input(model, str(write.name).replace(*_NAMES))
        number = str(write.name).rpartition(".")[2]
        for kind in _LEFT:
            names.setdefault(f"{kind}{number}", f"{kind}{_OWN}{index}")
        if last[write] in part:
            own.append(group)
            names[f"W{number}"] = f"W{_OWN}{index}"
            continue
        own.append(_inputs(index))
        side = SideInputs(dict(zip(group, own[-1], strict=True)), shape_only=None, suffix=f".own{index}")
        between = [node for layer in part for node in _derive(layers[layer], side, own[-1][0])]
        for node in [*between, *side.cloned]:
            rename_dims(node, {f"W{number}": f"W{_OWN}{index}"})
        cloned += side.cloned
    model.graph.extend(cloned)
    drop_unused(model)
    _rename(model, own, names)
    caches = [
        value
        for group, part in zip(own, parts, strict=True)
        for value in (*group, *(c for index in part for c in (layers[index].key_cache, layers[index].value_cache)))
    ]
    model.graph.inputs[:] = [value for value in model.graph.inputs if value not in set(caches)] + caches
    model.graph.sort()
    return model


_Group = tuple[ir.Value, ir.Value]  # write_indices and key_positions
_NAMES = "write_indices", "key_positions"
_LEFT = "Sk", "Nk"  # tokens, and visual ones, that a selection leaves to the group of their number
_OWN = "of"  # while the numbers of old groups and of new ones would be the same


def _inputs(index: int) -> _Group:
    write = ir.val(f"write_indices.{index}/own", dtype=ir.DataType.INT64, shape=("B",))
    return write, ir.val(f"key_positions.{index}/own", dtype=ir.DataType.INT64, shape=(f"W{_OWN}{index}",))


def _derive(layer: Layer, side: SideInputs, write: ir.Value) -> list[ir.Node]:
    """Let a layer read its part's inputs; returns the nodes between its caches and its attention."""
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
