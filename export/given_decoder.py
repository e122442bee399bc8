"""A decoder that another exporter wrote, in place of the traced one: its graph in the contract's form, its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import torch

from vlmtrim.export.job import Refusal
from vlmtrim.export.weights import make_header
from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.files import load
from vlmtrim.graphs.foreign.boundary import is_foreign, recognise
from vlmtrim.graphs.foreign.own_form import own_form
from vlmtrim.runtime.progress import Progress

FILE = "decoder.safetensors"
_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape arithmetic finds them
_DTYPES = {
    ir.DataType.FLOAT: (torch.float32, "float32"),
    ir.DataType.FLOAT16: (torch.float16, "float16"),
    ir.DataType.BFLOAT16: (torch.bfloat16, "bfloat16"),
    ir.DataType.INT64: (torch.int64, "int64"),
    ir.DataType.INT32: (torch.int32, "int32"),
    ir.DataType.BOOL: (torch.bool, "bool"),
}


def read(path: str, spec: GraphSpec) -> ir.Model:
    """The decoder with the boundary ``spec``.

    Raises Refusal where the file is no decoder of that model or dtype, GraphError where it has no such form.
    """
    try:
        model = load(path)
    except ValueError as error:
        raise Refusal(f"--decoder {path} is not a readable ONNX file") from error
    if not is_foreign(model):
        raise Refusal(f"--decoder {path} is no decoder with caches that grow, past_key_values.L.key/value")
    boundary, wanted = recognise(model), spec.inputs[0].dtype
    caches = [tensor for tensor in spec.inputs if tensor.name.startswith("past_")]
    dtype = _DTYPES.get(boundary.tokens.dtype or ir.DataType.UNDEFINED, (None, str(boundary.tokens.dtype)))[1]
    if dtype != wanted:
        raise Refusal(f"--decoder {path} computes in {dtype}, the bundle in {wanted}; give --dtype {dtype}")
    if 2 * len(boundary.caches) != len(caches):
        raise Refusal(f"--decoder {path} has {len(boundary.caches)} layers, the checkpoint {len(caches) // 2}")
    capacity = caches[0].shape[2]
    assert isinstance(capacity, int)
    return own_form(model, capacity)


def store(model: ir.Model, folder: Path, progress: Progress) -> None:
    """Copy the decoder's weights into the bundle, ``decoder.safetensors``, tensor by tensor, and refer to them there.

    Raises Refusal where the disk is too small, GraphError for a dtype that a bundle does not hold.
    """
    small, large = {}, {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _DTYPES:
            raise GraphError(f"the decoder's weight {name} is {value.dtype}, which a bundle does not hold")
        (large if tensor.nbytes >= _INLINE_BYTES else small)[name] = tensor
    shapes = {name: tuple(map(int, tensor.shape.numpy())) for name, tensor in large.items()}
    header = make_header({name: (_DTYPES[tensor.dtype][0], shapes[name]) for name, tensor in large.items()})
    total, free = len(header) + sum(t.nbytes for t in large.values()), shutil.disk_usage(folder).free
    if total > free:
        raise Refusal(
            f"the decoder's weights take {total / 1e6:.1f} MB, {free / 1e6:.1f} MB of disk are free; make room"
        )
    with (folder / FILE).open("wb") as stream:
        stream.write(header)
        for name, tensor in large.items():
            place = {"shape": ir.Shape(shapes[name]), "name": name, "base_dir": folder}
            kept = ir.ExternalTensor(FILE, stream.tell(), tensor.nbytes, tensor.dtype, **place)
            stream.write(tensor.tobytes())
            progress(stream.tell(), total)
            model.graph.initializers[name].const_value = kept
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
    for name, tensor in small.items():
        model.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
