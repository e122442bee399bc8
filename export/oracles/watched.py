"""What the text layers' attention computes on, caught by an attention function of transformers' own registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "vlmtrim-watched"
_last: dict[Any, tuple[Tensor, Tensor, float]] = {}


def watch(text: Any) -> None:
    """Let a text model's attention be plain softmax attention that remembers its queries and keys."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    text.config._attn_implementation = NAME


def last(layer: Any) -> tuple[Tensor, Tensor, float]:
    """(queries [H, S, Dh], keys [KV, W, Dh], scale) of a layer's last call, batch 1."""
    return _last[layer.self_attn]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    _last[module] = query[0], key[0], scaling
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    paid = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (paid @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), paid
