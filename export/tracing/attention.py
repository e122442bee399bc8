"""What Hugging Face decoders call while they are traced: one fused Attention a layer, caches written in place.

``transformers.AttentionInterface`` lets any model run with an attention function registered by name, and a decoder
takes any object with ``update`` as its cache; so the model's own code stays as it is and the trace holds
one ``Attention`` and two ``TensorScatter`` nodes a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "vlmtrim"


def onnx_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Trace one ONNX Attention. query [B, H, S, Dh], key and value [B, KV, W, Dh], mask additive [B, 1, S, W].

    The query is scaled beforehand and ``scale`` is 1: TensorRT's parser would otherwise scale the whole key cache.
    Returns ([B, S, H, Dh], None), as transformers expects.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = [query * scale, key, value]
    if attention_mask is not None:
        inputs.append(attention_mask)
    output = torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": 1.0}, dtype=query.dtype, shape=query.shape, version=23
    )
    return output.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, onnx_attention)


class StaticCache:
    """Caches of fixed capacity: a step's keys and values are written at ``write_indices``, the live window is read.

    Args:
        past: (key, value) caches of each layer, [B, KV, C, Dh].
        write_indices: int64 [B].
        window: number of entries that attention reads.
    """

    def __init__(self, past: list[tuple[Tensor, Tensor]], write_indices: Tensor, window: int):
        self.present = list(past)
        self._write_indices = write_indices
        self._window = window

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """transformers asks for it to derive positions; ours are explicit."""
        return 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write key and value [B, KV, S, Dh]; returns the live window [B, KV, W, Dh] of both."""
        old_key, old_value = self.present[layer_idx]
        present = self._write(old_key, key), self._write(old_value, value)
        self.present[layer_idx] = present
        return present[0][:, :, : self._window], present[1][:, :, : self._window]

    def _write(self, cache: Tensor, update: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            [cache, update, self._write_indices],
            {"axis": 2},
            dtype=cache.dtype,
            shape=cache.shape,
            version=24,
        )
