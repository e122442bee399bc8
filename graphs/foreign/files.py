"""Saving beside the weights: a decoder refers to them where they lie, and none is copied."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError


def save_beside(model: ir.Model, path: str | Path) -> list[Path]:
    """Write an ONNX file whose external weights stay where they are; returns their files.

    It is written under another name first, so that it is there whole or not at all. Raises GraphError where weights are
    missing, cut off, or out of reach: loaders take external data from the model's folder and those below it alone.
    """
    path = Path(path)
    folder, files = path.parent.resolve(), {}
    for tensor, replace in _external(model):
        place = Path(tensor.path)
        if place not in files:
            files[place] = _size(place)
        if (tensor.offset or 0) + (tensor.length or 0) > files[place]:
            raise GraphError(f"the weight {tensor.name} ends behind the end of {place}: the file is cut off")
        target = place.resolve()
        if not target.is_relative_to(folder):
            raise GraphError(
                f"the weights lie in {place.parent.resolve()}, where no loader looks for those of {path}: write the "
                f"decoder to that folder, e.g. {place.parent.resolve() / path.name}"
            )
        replace(
            ir.ExternalTensor(
                target.relative_to(folder).as_posix(),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=folder,
            )
        )
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            ir.save(model, passing)
        except ir.serde.SerdeError as error:
            cause = error.__cause__ or error
            raise GraphError(f"{path} cannot be written, what it holds is no valid ONNX: {cause}") from error
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)
    return sorted({place.resolve() for place in files})


def _size(place: Path) -> int:
    """Bytes of a file of weights. Raises GraphError where there is no such file."""
    try:
        found = place.stat()
    except OSError as error:
        raise GraphError(
            f"the weights {place} cannot be read: {error.strerror}; put them beside the decoder"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise GraphError(f"the weights {place} are no regular file")
    return found.st_size


def _external(model: ir.Model) -> Iterator[tuple[ir.ExternalTensor, Callable[[ir.ExternalTensor], None]]]:
    """External tensors anywhere in a model, each with what puts another one in its place."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        graph = graphs.pop()
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value, lambda tensor, value=value: setattr(value, "const_value", tensor)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.GRAPH:
                    graphs.append(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    graphs += attribute.as_graphs()
                elif isinstance(attribute.value, ir.ExternalTensor):
                    attributes = node.attributes
                    yield (
                        attribute.value,
                        lambda tensor, a=attributes, n=name: a.__setitem__(n, ir.AttrTensor(n, tensor)),
                    )
