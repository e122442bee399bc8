"""Brings a checkpoint's weights into a bundle: its files as they are, or written anew, one tensor at a time."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vlmtrim.export.job import Refusal
from vlmtrim.export.weights import files, taking
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.quantised.matrix import Quantised
from vlmtrim.graphs.formats import Packing, load_format
from vlmtrim.runtime.progress import Progress

# safetensors has no dtype of two weights in a byte: they are bytes there.
_DTYPES = {"int4": torch.uint8, "float4e2m1": torch.uint8, "int8": torch.int8, "float8e4m3fn": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Wanted:
    """How a checkpoint's weights are to lie in the bundle.

    Attributes:
        dtype: that the graphs compute in.
        packings: parameter -> how its matrix is packed.
        matched: parameter -> tensor of the checkpoint; needed where anything is packed.
        clip: a value that does not fit the dtype becomes its largest instead of ending the export.
        ready: parameter -> what reads the arrays of a matrix that is packed already.
    """

    dtype: torch.dtype
    packings: Mapping[str, Packing] = field(default_factory=dict)
    matched: Mapping[str, str] = field(default_factory=dict)
    clip: bool = False
    ready: Mapping[str, Callable[[], tuple[np.ndarray, ...]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    def packed_from(self, tensor: str) -> list[str]:
        """Parameters that a tensor is packed for."""
        return [name for name in self.packings if self.matched[name] == tensor]

    def unpacked(self, tensor: str, stored: StoredTensor) -> bool:
        """Whether a tensor is needed as it is: by a parameter that is not packed, or by none that is known. What comes
        packed never is."""
        if isinstance(stored, Quantised):
            return False
        readers = [name for name, source in self.matched.items() if source == tensor]
        return not readers or any(name not in self.packings for name in readers)

    def dtype_of(self, tensor: StoredTensor) -> torch.dtype:
        """What a tensor that is not packed is stored in. Beside packed matrices, matrices stay as narrow as they come:
        whoever packs counts bytes."""
        own = tensor.dtype
        narrow = bool(self.packings) and len(tensor.shape) > 1 and own.itemsize < self.dtype.itemsize
        return own if narrow or not own.is_floating_point else self.dtype


def store(
    tensors: Mapping[str, StoredTensor], wanted: Wanted, folder: Path, progress: Progress, link: bool = False
) -> dict[str, StoredTensor]:
    """Bring the checkpoint's weights into ``folder`` and say where each tensor lies there.

    Same dtype and nothing to pack: its files are taken as they are (:mod:`vlmtrim.export.weights.taking`), as hard
    links where ``link`` is set. Otherwise one ``model.safetensors`` is written; names stay, and what a parameter is
    packed into is named ``<parameter>.<suffix>``. Raises Refusal for values that do not fit the dtype.
    """
    if wanted.packings or not files.keeps_files(tensors, wanted.dtype):
        return _write(tensors, wanted, folder / "model.safetensors", progress)
    taken = files.files_of(tensors)
    taking.take({file: folder / file.name for file in taken}, link, progress)
    if len(taken) > 1:
        shutil.copyfile(taken[0].parent / "model.safetensors.index.json", folder / "model.safetensors.index.json")
    return {
        name: StoredTensor(folder / t.file.name, t.code, t.shape, t.offset, t.length) for name, t in tensors.items()
    }


def _entries(tensors: Mapping[str, StoredTensor], wanted: Wanted) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of all that is written, in order."""
    entries = {}
    for name, tensor in tensors.items():
        if wanted.unpacked(name, tensor):
            entries[name] = wanted.dtype_of(tensor), tensor.shape
        for parameter in wanted.packed_from(name):
            outputs, inputs = tensor.shape
            for array in wanted.packings[parameter].arrays(inputs, outputs, wanted.name):
                dtype = _DTYPES.get(array.dtype) or getattr(torch, array.dtype)
                shape = (array.nbytes,) if dtype == torch.uint8 else array.shape
                entries[f"{parameter}.{array.suffix}"] = dtype, shape
    return entries


@dataclass
class _Counts:
    """What became of values on the way."""

    flushed: int = 0
    clipped: int = 0


def _write(
    tensors: Mapping[str, StoredTensor], wanted: Wanted, path: Path, progress: Progress
) -> dict[str, StoredTensor]:
    entries = _entries(tensors, wanted)
    header = files.make_header(entries)
    total = len(header) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())
    counts = _Counts()
    with path.open("wb") as stream:
        stream.write(header)
        for name, tensor in tensors.items():
            if wanted.unpacked(name, tensor):
                cast = _cast(name, tensor.read(), wanted.dtype_of(tensor), wanted.clip, counts)
                stream.write(cast.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for parameter in wanted.packed_from(name):
                for array in _packed(parameter, tensor, wanted, counts):
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    progress(stream.tell(), total)
            progress(stream.tell(), total)
    if counts.clipped:
        limit = torch.finfo(wanted.dtype).max
        print(f"weights: {counts.clipped} values were clipped to {limit:.6g} in {wanted.dtype}", file=sys.stderr)
    if counts.flushed:
        print(f"weights: {counts.flushed} small values became zero in {wanted.dtype}", file=sys.stderr)
    return files.read_header(path)


def _packed(parameter: str, tensor: StoredTensor, wanted: Wanted, counts: _Counts) -> Iterable[np.ndarray]:
    packing = wanted.packings[parameter]
    if parameter in wanted.ready:
        return wanted.ready[parameter]()
    if isinstance(tensor, Quantised):
        return _given(parameter, tensor, wanted, counts)
    matrix = tensor.read().t().to(torch.float32).contiguous().numpy()
    if not np.isfinite(matrix).all():
        raise Refusal(
            f"{tensor.file}: {parameter} holds values that are not finite, which {packing.format} cannot hold"
        )
    return load_format(packing.format).pack(matrix, packing.block, wanted.name)


def _given(parameter: str, tensor: Quantised, wanted: Wanted, counts: _Counts) -> Iterable[np.ndarray]:
    """The arrays of a matrix that comes packed, scales in the activations' dtype."""
    outputs, inputs = tensor.shape
    packing = wanted.packings[parameter]
    arrays = packing.arrays(inputs, outputs, wanted.name)
    for array, values in zip(arrays, tensor.load(packing), strict=True):
        stored = values
        if array.dtype == wanted.name:
            if not torch.isfinite(values).all():
                raise Refusal(
                    f"{tensor.file}: {parameter} has scales that are not finite; download the checkpoint again"
                )
            stored = _cast(f"{parameter}.{array.suffix}", values, wanted.dtype, wanted.clip, counts)
        yield stored.contiguous().reshape(-1).view(torch.uint8).numpy()


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype, clip: bool, counts: _Counts) -> torch.Tensor:
    cast = values.to(dtype)
    if cast is not values:
        overflow = torch.isinf(cast) & ~torch.isinf(values)
        counts.clipped += _clip(cast, overflow) if clip else _refuse_overflow(name, values, cast, overflow)
        counts.flushed += int(((cast == 0) & (values != 0)).sum())
    return cast


def _refuse_overflow(name: str, values: torch.Tensor, cast: torch.Tensor, overflow: torch.Tensor) -> int:
    count = int(overflow.sum())
    if count:
        largest = float(values.abs().max())
        raise Refusal(
            f"{name}: {count} values do not fit {cast.dtype} (largest {largest:.3g}, limit "
            f"{torch.finfo(cast.dtype).max:.3g}); export with --dtype bfloat16 or float32, or with --clip-overflow"
        )
    return 0


def _clip(cast: torch.Tensor, overflow: torch.Tensor) -> int:
    cast[overflow] = torch.copysign(torch.tensor(torch.finfo(cast.dtype).max, dtype=cast.dtype), cast[overflow])
    return int(overflow.sum())
