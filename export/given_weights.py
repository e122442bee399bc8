"""Weights of a graph that another exporter wrote: taken into the bundle as files, or copied tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from vlmtrim.export.job import Refusal
from vlmtrim.export.weights import make_header, taking
from vlmtrim.graphs.errors import GraphError
from vlmtrim.runtime.progress import Progress

_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape arithmetic finds them
DTYPES = {
    ir.DataType.FLOAT: (torch.float32, "float32"),
    ir.DataType.FLOAT16: (torch.float16, "float16"),
    ir.DataType.BFLOAT16: (torch.bfloat16, "bfloat16"),
    ir.DataType.INT64: (torch.int64, "int64"),
    ir.DataType.INT32: (torch.int32, "int32"),
    ir.DataType.BOOL: (torch.bool, "bool"),
}


def inline_small(model: ir.Model) -> None:
    """Put small weights of other files into the graph. Raises GraphError where such a file is missing or cut off."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and _bytes_of(tensor) < _INLINE_BYTES:
            with _place(tensor).open("rb") as stream:
                raw = b"".join(_pieces(stream, tensor))
            array = np.frombuffer(raw, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
            value.const_value = ir.tensor(array, dtype=tensor.dtype, name=tensor.name)


def store(model: ir.Model, name: str, folder: Path, progress: Progress, link: bool = False) -> str:
    """Bring the weights of the graph ``name`` into the bundle, and refer to them there; returns how
    (:mod:`..weights.taking`).

    Files of external data become ``NAME-N.data``, as hard links where ``link`` is set, as clones where the file system
    can. Else those weights that the graph reads are copied into ``NAME.safetensors``, tensor by tensor.
    Raises Refusal where the disk is too small or files cannot be linked, GraphError for a dtype that no bundle holds.
    """
    small, large = {}, {}
    for weight, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in DTYPES:
            raise GraphError(f"the weight {weight} of the {name} graph is {value.dtype}, which a bundle does not hold")
        (large if tensor.nbytes >= _INLINE_BYTES else small)[weight] = tensor
    outside = {name: tensor for name, tensor in large.items() if isinstance(tensor, ir.ExternalTensor)}
    files = sorted({_place(tensor) for tensor in outside.values()})
    means = taking.how(files, folder, link) if files and len(outside) == len(large) else taking.COPIED
    if means == taking.COPIED:
        kept = _copied(large, folder / f"{name}.safetensors", progress)
    else:
        places = {file: folder / f"{name}-{number}.data" for number, file in enumerate(files)}
        taking.take(places, link, progress)
        kept = {key: _moved(tensor, places[_place(tensor)], tensor.offset or 0) for key, tensor in outside.items()}
    for key, tensor in kept.items():
        model.graph.initializers[key].const_value = tensor
    for key, tensor in small.items():
        model.graph.initializers[key].const_value = ir.tensor(tensor.numpy(), name=key)
    return means


def _copied(large: dict[str, Any], target: Path, progress: Progress) -> dict[str, ir.ExternalTensor]:
    """Write weights one after the other; returns where they lie then."""
    shapes = {name: tuple(map(int, tensor.shape.numpy())) for name, tensor in large.items()}
    header = make_header({name: (DTYPES[tensor.dtype][0], shapes[name]) for name, tensor in large.items()})
    total, free = len(header) + sum(t.nbytes for t in large.values()), shutil.disk_usage(target.parent).free
    if total > free:
        raise Refusal(
            f"{target.name} takes {total / 1e6:.1f} MB, {free / 1e6:.1f} MB of disk are free; make room, or "
            "give --link-weights where they are external data on the same file system"
        )
    kept = {}
    with target.open("wb") as stream:
        stream.write(header)
        for name, tensor in large.items():
            kept[name] = _moved(tensor, target, stream.tell())
            if isinstance(tensor, ir.ExternalTensor):
                with _place(tensor).open("rb") as source:
                    for piece in _pieces(source, tensor):
                        stream.write(piece)
            else:
                stream.write(tensor.tobytes())
            progress(stream.tell(), total)
    return kept


def _place(tensor: ir.ExternalTensor) -> Path:
    """The file that a weight lies in, links followed: a hub's snapshot is made of links, which onnx does not read.

    Raises GraphError where the graph names a file outside of its folder, or one that is missing or cut off.
    """
    named, folder = Path(os.path.normpath(tensor.path)), Path(os.path.normpath(tensor.base_dir))
    if not named.is_relative_to(folder):
        raise GraphError(f"the weight {tensor.name} lies in {named}: put weights into {folder}, or below it")
    if not named.is_file():
        raise GraphError(f"the weights {named} are missing; put them beside the graph")
    if (tensor.offset or 0) + _bytes_of(tensor) > named.stat().st_size:
        raise GraphError(f"the weight {tensor.name} ends behind the end of {named}: the file is cut off")
    return named.resolve()


def _bytes_of(tensor: ir.ExternalTensor) -> int:
    return tensor.length or tensor.nbytes


def _pieces(stream: BinaryIO, tensor: ir.ExternalTensor) -> Iterator[bytes]:
    """The bytes of a weight in its file."""
    stream.seek(tensor.offset or 0)
    left = _bytes_of(tensor)
    while left and (piece := stream.read(min(left, taking.COPY_BYTES))):
        left -= len(piece)
        yield piece


def _moved(tensor: Any, file: Path, offset: int) -> ir.ExternalTensor:
    """The same weight in a file of the bundle."""
    place = {"shape": ir.Shape(tensor.shape), "name": tensor.name, "base_dir": file.parent}
    return ir.ExternalTensor(file.name, offset, tensor.nbytes, tensor.dtype, **place)
