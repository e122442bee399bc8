"""Checkpoint weights without loading them: headers are read, files are taken, initializers point into them.

A safetensors file is an 8-byte little-endian header length, a JSON header and raw tensors, which is just what
ONNX external data wants: file, offset, length. Only a change of dtype writes weights anew, one tensor at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from vlmtrim.export.job import Refusal

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
_IR_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, safetensors dtype code, shape, absolute byte offset and length."""

    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return _DTYPES[self.code]

    def read(self) -> torch.Tensor:
        """Load this one tensor."""
        if not self.length:
            return torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            raw = bytearray(stream.read(self.length))
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file. Raises Refusal where the file is damaged or truncated."""
    size_on_disk = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > size_on_disk:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(size))
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
        }
        return {
            name: _stored(path, name, code, shape, 8 + size + start, end - start, size_on_disk)
            for name, (code, shape, start, end) in entries.items()
        }
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(f"{path} is no safetensors file ({error}); download the checkpoint again") from error


def make_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file of these tensors begins with; their bytes follow in the same order without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _stored(
    path: Path, name: str, code: str, shape: tuple[int, ...], offset: int, length: int, size_on_disk: int
) -> StoredTensor:
    if code not in _DTYPES:
        raise Refusal(f"{path}: {name} has dtype {code}; supported: {', '.join(_DTYPES)}")
    if offset + length > size_on_disk:
        raise Refusal(
            f"{path} is truncated: {name} ends at byte {offset + length}, the file has {size_on_disk}; "
            "download the checkpoint again"
        )
    return StoredTensor(path, code, shape, offset, length)


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, sharded or not. Raises Refusal: nothing there, a shard missing, pickles."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refusal(f"{index} is no shard index ({error!r}); download the checkpoint again") from error
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        found = f"it holds pickled weights ({pickles[0]})" if pickles else "it holds none"
        raise Refusal(
            f"{folder}: expected model.safetensors or model.safetensors.index.json, {found}; "
            "save the model with save_pretrained(..., safe_serialization=True)"
        )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise Refusal(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(shards)}); download it again")
    tensors: dict[str, StoredTensor] = {}
    for name in shards:
        tensors.update(read_header(folder / name))
    return tensors


def common_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """The floating dtype that most bytes of the checkpoint have."""
    sizes = bytes_by_dtype(tensors)
    return max(sizes, key=lambda dtype: sizes[dtype])


def bytes_by_dtype(tensors: Mapping[str, StoredTensor]) -> dict[torch.dtype, int]:
    """Bytes of the checkpoint's floating tensors by their dtype."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.length
    return sizes


def match_parameters(model: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Parameter name -> tensor name, through transformers' own renaming rules and the model's tied weights.

    Raises Refusal where a parameter has no tensor or one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    matched: dict[str, str] = {}
    for name in tensors:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target in parameters:
            matched[target] = name
    for tied, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if tied in parameters and tied not in matched and source in matched:
            matched[tied] = matched[source]
    missing = sorted(set(parameters) - set(matched))
    if missing:
        raise Refusal(f"the checkpoint lacks {len(missing)} tensors of the model, the first is {missing[0]}")
    for name, source in matched.items():
        if tuple(parameters[name].shape) != tensors[source].shape:
            raise Refusal(
                f"{tensors[source].file}: {source} has shape {list(tensors[source].shape)}, "
                f"the config asks for {list(parameters[name].shape)}"
            )
    return matched


def keeps_files(tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Whether a bundle of that dtype can hold the checkpoint's files as they are."""
    return set(bytes_by_dtype(tensors)) <= {dtype}


def files_of(tensors: Mapping[str, StoredTensor]) -> list[Path]:
    """The files that tensors lie in."""
    return sorted({tensor.file for tensor in tensors.values()})


def check_bindings(
    model: ir.Model, matched: Mapping[str, str], tensors: Mapping[str, StoredTensor], dtype: torch.dtype
) -> None:
    """Raise Refusal unless every weight of a traced graph has a tensor of its shape and, once cast, of its dtype."""
    for name, value in model.graph.initializers.items():
        parameter = name.removeprefix("full.")
        if not name.startswith("full.") or parameter not in matched:
            continue
        tensor = tensors[matched[parameter]]
        target = dtype if tensor.dtype.is_floating_point else tensor.dtype
        found = tuple(value.shape or ())
        if found != tensor.shape or value.dtype != _IR_DTYPES.get(CODES[target]):
            raise Refusal(
                f"{tensor.file}: {matched[parameter]} is {target} {list(tensor.shape)} in the bundle, the graph reads "
                f"{parameter} as {value.dtype} {list(found)}; the checkpoint does not fit its config"
            )


def bind(model: ir.Model, matched: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> int:
    """Point every weight of a traced graph at its stored bytes; returns the number of weights bound.

    Weights are the initializers named ``full.<parameter>``; they are renamed to the parameter. What a parameter is
    packed into is stored under that name itself.
    """
    bound = 0
    for name in [name for name in model.graph.initializers if name.startswith("full.")]:
        value = model.graph.initializers.pop(name)
        parameter = name.removeprefix("full.")
        value.name = parameter
        source = parameter if parameter in stored and parameter not in matched else matched.get(parameter)
        if source is None:  # a buffer computed from the config, such as CLIP's position ids
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy(), name=parameter)
            model.graph.initializers.add(value)
            continue
        tensor = stored[source]
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            location=tensor.file.name,
            offset=tensor.offset,
            length=tensor.length,
            dtype=value.dtype,
            shape=ir.Shape(value.shape),
            name=parameter,
            base_dir=tensor.file.parent,
        )
        model.graph.initializers.add(value)
        bound += 1
    return bound


def stored_dtypes(
    model: ir.Model, matched: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> dict[str, ir.DataType]:
    """Weights of a traced graph that have a tensor of their own -> the dtype that it lies in."""
    parameters = {name: name.removeprefix("full.") for name in model.graph.initializers if name.startswith("full.")}
    tensors = {name: stored[matched[parameter]] for name, parameter in parameters.items() if parameter in matched}
    return {name: _IR_DTYPES[tensor.code] for name, tensor in tensors.items()}
