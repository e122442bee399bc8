"""compressed-tensors: integers of 4 or 8 bits, packed or not, and floats of 8 bits; weights only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.packing import HEAD, LAYERS, TOWER
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.quantised import fp8
from vlmtrim.export.weights.quantised.matrix import (
    ADVICE,
    Expected,
    Quantised,
    choice,
    groups,
    need,
    order_of,
    packing,
    quantised,
    unfit,
)
from vlmtrim.export.weights.quantised.unpacking import integers, unpack
from vlmtrim.graphs.formats import CHANNEL, Packing

TAKEN = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
)


def matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Quantised, tuple[str, ...]]]:
    """Every matrix that has a ``weight_scale``: ``weight_packed`` int32 [N, K bits / 32], or ``weight`` [N, K] of int8
    or float8_e4m3fn."""
    _check(settings)
    rows = _rows(settings)
    for name, parts in groups(tensors, "weight_scale", SUFFIXES):
        scale = parts["weight_scale"]
        if "weight_packed" in parts:
            yield name, _words(name, parts), SUFFIXES
        elif "weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn:
            need(name, parts, weight=2)
            yield name, fp8.floats(name, parts["weight"], scale, rows), SUFFIXES
        elif "weight" in parts and parts["weight"].dtype == torch.int8:
            yield name, _bytes(name, parts), SUFFIXES
        else:
            found = ", ".join(f"{suffix} {part.dtype}" for suffix, part in parts.items())
            raise Refusal(
                f"{scale.file}: {name} has {found}; taken are weight_packed of int32 and weight of int8 or "
                f"float8_e4m3fn: {ADVICE}"
            )


def expected(settings: Mapping[str, Any]) -> Expected:
    """All linear layers but those that the settings ignore, as the first group says."""
    _check(settings)
    weights = _weights(settings)[0]
    strategy, length = str(weights.get("strategy")), weights.get("group_size") or CHANNEL
    block = {"group": length, "block": 128}.get(strategy, CHANNEL)
    name = {"float": "fp8"}.get(str(weights.get("type")), f"int{weights.get('num_bits')}")
    name = "int4_zero" if name == "int4" and weights.get("symmetric") is False else name
    if name not in ("fp8", "int4", "int4_zero", "int8"):
        raise Refusal(f"quantization_config: integers of {weights.get('num_bits')} bits; taken: 4, 8: {ADVICE}")
    left = [_pattern(str(entry)) for entry in settings.get("ignore") or ()]
    return Expected(name, int(block), left, (LAYERS, HEAD, TOWER, None))


def _check(settings: Mapping[str, Any]) -> None:
    """Raise Refusal for formats that are more than integers or floats and their scales."""
    choice(settings, ("format",), TAKEN)
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        raise Refusal(f"quantization_config: sparsity_config has format {sparse['format']!r}; taken: dense: {ADVICE}")
    if settings.get("transform_config"):
        raise Refusal(f"quantization_config: transform_config turns activations, which no graph here does: {ADVICE}")


def _weights(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every group says of weights, at least one. Raises Refusal."""
    found = settings.get("config_groups")
    found = [group.get("weights") for group in found.values() if isinstance(group, dict)] if found else []
    found = [weights for weights in found if isinstance(weights, dict)]
    if not found:
        raise Refusal(f"quantization_config: config_groups says nothing of weights; {ADVICE}")
    return found


def _rows(settings: Mapping[str, Any]) -> int:
    """Rows that share a scale where floats have blocks."""
    block = next((weights.get("block_structure") for weights in _weights(settings)), None)
    return block[0] if isinstance(block, list) and block and isinstance(block[0], int) else fp8.BLOCK[0]


def _pattern(entry: str) -> str:
    """A regular expression that finds an ignored module in a parameter's name; prefixes of the two may differ."""
    if not entry.startswith("re:"):
        return re.escape(entry)
    try:
        re.compile(entry[3:])
    except re.error:
        return re.escape(entry[3:])
    return entry[3:].lstrip("^")


def _words(name: str, parts: Mapping[str, StoredTensor]) -> Quantised:
    need(name, parts, weight_packed=2, weight_shape=1)
    outputs, inputs = (int(size) for size in parts["weight_shape"].read())
    rows, columns = parts["weight_packed"].shape
    bits = next((bits for bits in (4, 8) if columns == -(-inputs * bits // 32)), None)
    if bits is None or rows != outputs or parts["weight_packed"].dtype != torch.int32:
        raise Refusal(
            f"{parts['weight_packed'].file}: {name}.weight_packed is {parts['weight_packed'].dtype} {[rows, columns]} "
            f"for weights {[outputs, inputs]}; taken are int32 words of integers of 4 or 8 bits: {ADVICE}"
        )
    scale = parts["weight_scale"]
    count = _count(name, parts, outputs)

    def zeros() -> Tensor:
        if "weight_zero_point" not in parts:
            return torch.full((count, outputs), 1 << (bits - 1), dtype=torch.uint8)
        return unpack(parts["weight_zero_point"].read(), bits, 0)[:outputs].t()

    symmetric = bool((zeros() == 1 << (bits - 1)).all())
    if bits == 8 and not symmetric:
        raise Refusal(
            f"{scale.file}: {name} has zero points beside integers of 8 bits; taken are symmetric ones: {ADVICE}"
        )
    packed = packing(name, f"int{bits}" if symmetric else "int4_zero", inputs, count)
    order = order_of(f"{name}.weight_g_idx", parts.get("weight_g_idx"), inputs, count)

    def load(chosen: Packing) -> tuple[Tensor, ...]:
        codes = unpack(parts["weight_packed"].read(), bits, 1)[:, :inputs].t().contiguous()
        return integers(chosen, bits, codes, _spread(scale, outputs)[order], zeros()[order])

    return quantised(scale, (outputs, inputs), packed, load)


def _bytes(name: str, parts: Mapping[str, StoredTensor]) -> Quantised:
    need(name, parts, weight=2)
    weight, scale, zeros = parts["weight"], parts["weight_scale"], parts.get("weight_zero_point")
    outputs, inputs = weight.shape
    if zeros is not None and zeros.read().any():
        raise Refusal(
            f"{scale.file}: {name} has zero points beside integers of 8 bits; taken are symmetric ones: {ADVICE}"
        )
    count = _count(name, parts, outputs)
    packed = packing(name, "int8", inputs, count)
    order = order_of(f"{name}.weight_g_idx", parts.get("weight_g_idx"), inputs, count)

    def load(chosen: Packing) -> tuple[Tensor, ...]:
        scales = _spread(scale, outputs)[order]
        return weight.read().t().contiguous(), scales[0] if chosen.block == CHANNEL else scales

    return quantised(scale, (outputs, inputs), packed, load)


def _count(name: str, parts: Mapping[str, StoredTensor], outputs: int) -> int:
    """Scales along K. Raises Refusal where they are neither one nor one a row."""
    shape = parts["weight_scale"].shape
    if len(shape) > 2 or (shape and shape[0] not in (1, outputs)):
        raise unfit(name, parts)
    return shape[1] if len(shape) == 2 else 1


def _spread(scale: StoredTensor, outputs: int) -> Tensor:
    """Scales [N, G], [N] or one -> [G, N]."""
    values = scale.read()
    values = values.reshape(-1, 1) if values.ndim < 2 else values
    return values.expand(outputs, -1).t()
