"""Lets a graph compute in a wider dtype than some of its weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def widen(model: ir.Model, stored: Mapping[str, ir.DataType]) -> None:
    """Put a Cast behind every initializer of ``stored``, in place; behind a Gather of rows where that is what reads it,
    so that a table of embeddings is never wide as a whole."""
    for name, narrow in stored.items():
        value = model.graph.initializers.get(name)
        if value is None or value.dtype == narrow:
            continue
        wide = value.dtype
        assert wide is not None
        value.type = ir.TensorType(narrow)  # a type of its own: clones of a graph share those they have
        readers = [(node, index) for node, index in value.uses()]
        tables = [
            n for n, index in readers if n.op_type == "Gather" and index == 0 and n.attributes.get_int("axis", 0) == 0
        ]
        for node in tables:
            rows = node.outputs[0]
            cast = ir.node("Cast", [rows], attributes={"to": int(wide)}, name=f"{rows.name}/wide")
            cast.outputs[0].name = f"{rows.name}/wide"
            cast.outputs[0].dtype, cast.outputs[0].shape = wide, rows.shape
            rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, rows)
            rows.type = ir.TensorType(narrow)
            model.graph.insert_after(node, cast)
        others = [(node, index) for node, index in readers if node not in tables]
        if others:
            cast = ir.node("Cast", [value], attributes={"to": int(wide)}, name=f"{name}/wide")
            cast.outputs[0].name, cast.outputs[0].shape = f"{name}/wide", value.shape
            cast.outputs[0].dtype = wide
            for node, index in others:
                node.replace_input_with(index, cast.outputs[0])
            model.graph.insert_before(model.graph[0], cast)
