"""TidalDecode a second time, from the paper's rules (arXiv 2410.05076), as attention under masks.

Nothing is gathered: a layer that reads chosen entries attends to all of them in transformers' own module, under a mask
that differs from head to head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, added, causal


class Oracle:
    """``selection``: ``entries`` and ``selecting``. ``chosen`` holds the last step's entries by selecting layer, bool
    [KV, P + S]."""

    def __init__(self, selection: Mapping[str, Any]):
        self._entries, self._selecting = selection["entries"], selection["selecting"]
        self.chosen: dict[int, Tensor] = {}

    def layers(self, text: Any, cache: Any, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Kept]:
        """(hidden states [1, S, D], nothing: all tokens stay); ``hidden`` [1, S, D]."""
        depth, tokens = len(text.layers), hidden.shape[1]
        selecting = self._selecting or [2, round(2 * depth / 5)]
        rotary, self.chosen, allowed, nearest = text.rotary_emb(hidden, positions), {}, None, float("inf")
        for index, layer in enumerate(text.layers):
            mask = causal(tokens, cache.get_seq_length(index))
            chooses = index in selecting
            if allowed is not None and not chooses:
                mask = mask.masked_fill(~allowed, torch.finfo(torch.float32).min)
            output, paid = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=rotary,
                attention_mask=mask,
                past_key_values=cache,
            )
            hidden = hidden + output
            hidden = added(text, index, hidden + layer.mlp(layer.post_attention_layernorm(hidden)), positions)
            if chooses and tokens == 1:
                heads = cache.layers[index].keys.shape[1]
                self.chosen[index], near = self._best(paid[0, :, 0].unflatten(0, (heads, -1)).mean(1))
                nearest = min(nearest, near)
                allowed = self.chosen[index].repeat_interleave(paid.shape[1] // heads, dim=0)[None, :, None]
        return hidden, Kept(nearest=nearest)

    def _best(self, paid: Tensor) -> tuple[Tensor, float]:
        """(which entries stay for each key head, bool [KV, W], how near the nearest is to changing sides, relative to
        the least that stays) by the attention [KV, W] that the newest token pays."""
        paid = paid.clone()
        paid[:, -1] = torch.inf  # its own
        order = torch.sort(paid, dim=1, descending=True, stable=True)
        stays = torch.zeros(paid.shape, dtype=torch.bool).scatter(1, order.indices[:, : self._entries], True)
        if not 1 < self._entries < paid.shape[1]:
            return stays, float("inf")
        worst, best_left = order.values[:, self._entries - 1], order.values[:, self._entries]
        return stays, float(((worst - best_left) / worst).min())
