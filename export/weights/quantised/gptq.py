"""gptq: integers of 4 or 8 bits in groups of inputs, with zero points; groups that are not in order are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.packing import HEAD, LAYERS
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.quantised.matrix import (
    ADVICE,
    Expected,
    Quantised,
    choice,
    groups,
    integer,
    need,
    order_of,
    packing,
    quantised,
    unfit,
)
from vlmtrim.export.weights.quantised.unpacking import integers, unpack
from vlmtrim.graphs.formats import Packing

FORMATS = {4: "int4", 8: "int8"}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Quantised, tuple[str, ...]]]:
    """Every matrix: ``qweight`` int32 [K bits / 32, N], ``qzeros`` int32 [G, N bits / 32], ``scales`` [G, N] and, where
    it is there, ``g_idx`` int32 [K], the group of every input."""
    bits = _bits("quantization_config", integer(settings, "bits"))
    less = {"gptq": 1, "gptq_v2": 0}[choice(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))]
    for name, parts in groups(tensors, "qweight", SUFFIXES):
        need(name, parts, qweight=2, qzeros=2, scales=2)
        yield name, _matrix(name, parts, bits, less), SUFFIXES


def expected(settings: Mapping[str, Any]) -> Expected:
    """All of the decoder's layers, and the head where the settings say so."""
    bits, group = _bits("quantization_config", integer(settings, "bits")), integer(settings, "group_size", 128)
    zeros = bits == 4 and settings.get("sym") is False
    parts = (LAYERS, HEAD) if settings.get("lm_head") else (LAYERS,)
    return Expected("int4_zero" if zeros else FORMATS[bits], max(group, 0), parts=parts)


def _matrix(name: str, parts: Mapping[str, StoredTensor], bits: int, less: int) -> Quantised:
    (rows, outputs), (count, _) = parts["qweight"].shape, parts["scales"].shape
    if "g_idx" in parts and parts["g_idx"].shape[0]:  # settings may name other bits for some layers
        bits = _bits(name, rows * 32 // parts["g_idx"].shape[0])
    inputs = rows * 32 // bits
    if parts["scales"].shape[1] != outputs or parts["qzeros"].shape != (count, outputs * bits // 32):
        raise unfit(name, parts)
    symmetric = bool((_zeros(parts, bits, less) == 1 << (bits - 1)).all())
    if bits == 8 and not symmetric:
        raise Refusal(
            f"{parts['qzeros'].file}: {name} has zero points beside integers of 8 bits; taken are symmetric ones "
            f"(sym: true): {ADVICE}"
        )
    packed = packing(name, FORMATS[bits] if symmetric else "int4_zero", inputs, count)
    order = order_of(f"{name}.g_idx", parts.get("g_idx"), inputs, count)

    def load(chosen: Packing) -> tuple[Tensor, ...]:
        codes = unpack(parts["qweight"].read(), bits, 0)
        zeros = _zeros(parts, bits, less)
        return integers(chosen, bits, codes, parts["scales"].read()[order], zeros[order])

    return quantised(parts["scales"], (outputs, inputs), packed, load)


def _zeros(parts: Mapping[str, StoredTensor], bits: int, less: int) -> Tensor:
    """Zero points, uint8 [G, N]; the older form stores them less one, within their bits."""
    return (unpack(parts["qzeros"].read(), bits, 1) + less) & ((1 << bits) - 1)


def _bits(where: str, bits: int) -> int:
    if bits not in FORMATS:
        raise Refusal(f"{where}: integers of {bits} bits; taken: {', '.join(map(str, FORMATS))}: {ADVICE}")
    return bits
