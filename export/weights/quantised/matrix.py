"""A matrix that a checkpoint holds packed, and what it is as one of our formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.packing import LAYERS, part_of
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.graphs.formats import CHANNEL, Packing, load_format

ADVICE = "give the checkpoint that is not quantised, with --weights"


@dataclass(frozen=True)
class Quantised(StoredTensor):
    """A matrix in the place of the tensor that its floats would be: shape [N, K]; file, dtype and bytes are those of
    its scales.

    Attributes:
        packing: how a bundle stores it.
        load: packing -> its arrays in the order of that format's, scales in the dtype that they come in.
    """

    packing: Packing
    load: Callable[[Packing], tuple[Tensor, ...]]

    def read(self) -> Tensor:
        """There are no floats to read."""
        raise TypeError("a quantised matrix is loaded, not read")


def quantised(
    scales: StoredTensor, shape: tuple[int, int], packing: Packing, load: Callable[[Packing], tuple[Tensor, ...]]
) -> Quantised:
    """A matrix [N, K] with these scales. Raises Refusal where they are no floats."""
    if not scales.dtype.is_floating_point or scales.dtype.itemsize < 2:
        raise Refusal(
            f"{scales.file}: scales of dtype {scales.dtype}; float32, float16 and bfloat16 are taken: {ADVICE}"
        )
    return Quantised(scales.file, scales.code, shape, scales.offset, scales.length, packing, load)


@dataclass(frozen=True)
class Expected:
    """What settings say of matrices: format and block, and which parameters are left out, as regular expressions."""

    format: str
    block: int
    left: Sequence[str] = ()
    parts: Sequence[str | None] = (LAYERS,)

    def covers(self, parameter: str) -> bool:
        """Whether a parameter comes packed."""
        return part_of(parameter) in self.parts and not any(re.search(pattern, parameter) for pattern in self.left)


def groups(
    tensors: Mapping[str, StoredTensor], marker: str, suffixes: Sequence[str]
) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Every ``<name>`` that has ``<name>.<marker>``, with its tensors by suffix."""
    for key in tensors:
        name, _, last = key.rpartition(".")
        if last == marker:
            yield name, {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes if f"{name}.{suffix}" in tensors}


def need(name: str, parts: Mapping[str, StoredTensor], **ranks: int) -> None:
    """Raise Refusal unless a matrix has these parts, each with so many dimensions."""
    for suffix, rank in ranks.items():
        if suffix not in parts:
            raise Refusal(f"{name} has no {suffix}; the checkpoint is incomplete, download it again")
        if len(parts[suffix].shape) != rank:
            raise Refusal(
                f"{parts[suffix].file}: {name}.{suffix} has shape {list(parts[suffix].shape)}, expected {rank} "
                "dimensions; the checkpoint does not fit its quantization_config"
            )


def unfit(name: str, parts: Mapping[str, StoredTensor]) -> Refusal:
    """What to raise where a matrix's parts do not belong together."""
    file = next(iter(parts.values())).file
    found = ", ".join(f"{suffix} {list(part.shape)}" for suffix, part in parts.items())
    return Refusal(
        f"{file}: {name} has {found}, which do not fit each other; download the checkpoint again, or {ADVICE}"
    )


def packing(name: str, format_: str, inputs: int, count: int) -> Packing:
    """A format with ``count`` scales along K. Raises Refusal for a length of a block that it does not take."""
    blocks = load_format(format_).BLOCKS
    if count == 1 and CHANNEL in blocks:
        return Packing(format_, CHANNEL)
    if count < 1 or inputs % count or inputs // count not in blocks:
        taken = ", ".join("a whole column" if block == CHANNEL else str(block) for block in blocks)
        length = f"{inputs / max(count, 1):g}"
        raise Refusal(f"{name} has {inputs} inputs in groups of {length}; {format_} weights take {taken}: {ADVICE}")
    return Packing(format_, inputs // count)


def order_of(name: str, groups: StoredTensor | None, inputs: int, count: int) -> Tensor:
    """Rows of scales for the groups as their inputs come, int64 [count].

    Args:
        groups: int32 [K], the group of every input; None where they are in order.

    Raises:
        Refusal: inputs of one group do not lie side by side.
    """
    if groups is None or not groups.shape[0]:
        return torch.arange(count)
    runs = groups.read().long().reshape(count, inputs // count)
    if int(runs.min()) < 0 or int(runs.max()) >= count:
        raise Refusal(f"{groups.file}: {name} names groups {int(runs.min())} to {int(runs.max())}, there are {count}")
    if not (runs == runs[:, :1]).all():
        raise Refusal(
            f"{groups.file}: {name} is not in order (desc_act, act-order), and DequantizeLinear reads groups of inputs "
            f"that lie side by side: take a checkpoint without act-order, or {ADVICE}"
        )
    return runs[:, 0]


def integer(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number of the settings. Raises Refusal where it is missing or none."""
    value = settings.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refusal(f"quantization_config: {key} is {value!r}, expected a number; {ADVICE}")
    return value


def choice(settings: Mapping[str, Any], keys: Sequence[str], taken: Sequence[str]) -> str:
    """What the first of ``keys`` names, the first of ``taken`` where none is there. Raises Refusal for others."""
    value = str(next((settings[key] for key in keys if settings.get(key) is not None), taken[0])).lower()
    if value not in taken:
        raise Refusal(f"quantization_config: {keys[0]} is {value!r}; taken: {', '.join(taken)}: {ADVICE}")
    return value
