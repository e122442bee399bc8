"""awq: integers of 4 bits in groups of inputs with zero points, in the order of its gemm kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.quantised.matrix import (
    ADVICE,
    Expected,
    Quantised,
    choice,
    groups,
    integer,
    need,
    packing,
    quantised,
    unfit,
)
from vlmtrim.export.weights.quantised.unpacking import integers, unpack
from vlmtrim.graphs.formats import Packing

BITS = 4
SUFFIXES = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of a word's nibbles, from its lowest bits on


def matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Quantised, tuple[str, ...]]]:
    """Every matrix: ``qweight`` int32 [K, N / 8], ``qzeros`` int32 [G, N / 8], ``scales`` [G, N]."""
    _check(settings)
    for name, parts in groups(tensors, "qweight", SUFFIXES):
        need(name, parts, qweight=2, qzeros=2, scales=2)
        yield name, _matrix(name, parts), SUFFIXES


def expected(settings: Mapping[str, Any]) -> Expected:
    """All of the decoder's layers but those that the settings leave out."""
    _check(settings)
    zeros = settings.get("zero_point", True)
    return Expected("int4_zero" if zeros else "int4", max(integer(settings, "group_size", 128), 0))


def _check(settings: Mapping[str, Any]) -> None:
    bits = integer(settings, "bits", settings.get("w_bit", BITS))
    if bits != BITS:
        raise Refusal(f"quantization_config: integers of {bits} bits; taken: {BITS}: {ADVICE}")
    choice(settings, ("version", "format"), ("gemm",))


def _matrix(name: str, parts: Mapping[str, StoredTensor]) -> Quantised:
    (inputs, words), (count, outputs) = parts["qweight"].shape, parts["scales"].shape
    if outputs != words * 32 // BITS or parts["qzeros"].shape != (count, words):
        raise unfit(name, parts)
    symmetric = bool((parts["qzeros"].read() == torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)).all())
    packed = packing(name, "int4" if symmetric else "int4_zero", inputs, count)

    def load(chosen: Packing) -> tuple[Tensor, ...]:
        codes, zeros = (unpack(parts[suffix].read(), BITS, 1, ORDER) for suffix in ("qweight", "qzeros"))
        return integers(chosen, BITS, codes, parts["scales"].read(), zeros)

    return quantised(parts["scales"], (outputs, inputs), packed, load)
