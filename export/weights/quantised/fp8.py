"""fp8: floats of 8 bits (e4m3) with a scale a tensor, a column, or a block of 128 x 128; for engines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.packing import LAYERS, TOWER
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.quantised.matrix import ADVICE, Expected, Quantised, groups, need, packing, quantised
from vlmtrim.graphs.formats import CHANNEL, Packing

SCALES = ("weight_scale_inv", "weight_scale")  # the weights are multiplied by both
SUFFIXES = ("weight", *SCALES, "activation_scale", "input_scale")
BLOCK = (128, 128)


def matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Quantised, tuple[str, ...]]]:
    """Every matrix: ``weight`` float8_e4m3fn [N, K] with a scale [], a scale a row or one a block."""
    rows = _block(settings)[0]
    for marker in SCALES:
        for name, parts in groups(tensors, marker, SUFFIXES):
            need(name, parts, weight=2)
            if parts["weight"].dtype == torch.float8_e4m3fn:
                yield name, floats(name, parts["weight"], parts[marker], rows), SUFFIXES


def expected(settings: Mapping[str, Any]) -> Expected:
    """All linear layers but those that the settings leave out."""
    left = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    block = BLOCK[1] if settings.get("weight_block_size") else CHANNEL
    return Expected("fp8", block, ["^lm_head", *(re.escape(str(name)) for name in left)], (LAYERS, TOWER, None))


def floats(name: str, weight: StoredTensor, scale: StoredTensor, rows: int) -> Quantised:
    """A matrix of floats; ``rows`` of it share a scale where it has blocks. Raises Refusal for other scales."""
    outputs, inputs = weight.shape
    shape = scale.shape if len(scale.shape) == 2 else (scale.shape[0] if scale.shape else 1, 1)
    if len(scale.shape) > 2 or shape[0] not in (1, outputs, -(-outputs // rows)):
        raise Refusal(
            f"{scale.file}: {name} has scales {list(scale.shape)} for weights {[outputs, inputs]}; taken are one, one "
            f"for each row, and one for each block of {rows} rows: {ADVICE}"
        )
    packed = packing(name, "fp8", inputs, shape[1])
    each = {1: outputs, outputs: 1}.get(shape[0], rows)

    def load(chosen: Packing) -> tuple[Tensor, ...]:
        codes = weight.read().view(torch.uint8).t().contiguous()
        if bool(((codes & 0x7F) == 0x7F).any()):
            raise Refusal(f"{weight.file}: {name} holds values that are no numbers; download the checkpoint again")
        scales = scale.read().reshape(shape).t().repeat_interleave(each, dim=1)[:, :outputs]
        return codes.view(torch.float8_e4m3fn), scales[0] if chosen.block == CHANNEL else scales

    return quantised(scale, (outputs, inputs), packed, load)


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and inputs of a block, BLOCK where the settings name none. Raises Refusal for other inputs."""
    block = settings.get("weight_block_size") or BLOCK
    fits = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if not fits or block[1] != BLOCK[1]:
        raise Refusal(f"quantization_config: weight_block_size is {block}; taken: [rows, {BLOCK[1]}]: {ADVICE}")
    return block[0], block[1]
