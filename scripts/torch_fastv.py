"""LLaVA in transformers with visual tokens dropped before layer k, as FastV's users run it, to compare with.

The layers are transformers' own; layer k-1 attends eagerly for its scores (as published), the others as asked. The
caches of layers >= k hold the survivors only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class TorchFastV:
    """One conversation, batch 1.

    Args:
        model: LlavaForConditionalGeneration.
        k, r: layers that run on all tokens; share of visual tokens removed after them.
        attention: ``eager`` or ``sdpa``, of the layers other than k-1.
    """

    def __init__(self, model: Any, k: int, r: float, attention: str):
        self._model, self._text = model, model.model.language_model
        self._k, self._r, self._attention = k, r, attention
        self.cache: Any = DynamicCache()
        self.kept = torch.zeros(0, dtype=torch.int64)
        self._position = 0

    @torch.no_grad()
    def prefill(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """ids [1, S], pixel values [I, 3, H, W] -> logits [V]; ``kept`` tells the survivors."""
        hidden = self._text.embed_tokens(ids)
        visual = torch.nonzero(ids[0] == self._model.config.image_token_id)[:, 0]
        features = self._model.get_image_features(pixel_values=pixels)
        hidden[0, visual] = torch.cat(list(getattr(features, "pooler_output", features))).to(hidden.dtype)
        self._position = ids.shape[1]
        return self._run(hidden, torch.arange(ids.shape[1], device=ids.device)[None], visual)

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """token [1, 1] -> logits [V]."""
        positions = torch.tensor([[self._position]], device=token.device)
        self._position += 1
        return self._run(self._text.embed_tokens(token), positions, None)

    def _run(self, hidden: Tensor, positions: Tensor, visual: Tensor | None) -> Tensor:
        text, seen = self._text, []
        rotary = text.rotary_emb(hidden, positions)
        for index, layer in enumerate(text.layers):
            if visual is not None and index == self._k:
                self.kept = self._choose(seen[0], visual)
                hidden, positions = hidden[:, self.kept], positions[:, self.kept]
                rotary = text.rotary_emb(hidden, positions)
            scoring = visual is not None and index == self._k - 1
            text.config._attn_implementation = "eager" if scoring else self._attention
            mask = None
            if visual is not None and text.config._attn_implementation == "eager":
                tokens = hidden.shape[1]
                blank = hidden.new_full((tokens, tokens), torch.finfo(hidden.dtype).min)
                mask = blank.triu(1)[None, None]
            handle = layer.self_attn.register_forward_hook(lambda _, __, out: seen.append(out[1])) if scoring else None
            output = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                past_key_values=self.cache,
                use_cache=True,
            )
            hidden = output[0] if isinstance(output, tuple) else output
            if handle is not None:
                handle.remove()
        return self._model.lm_head(text.norm(hidden[:, -1:]))[0, 0]

    def _choose(self, attention: Tensor, visual: Tensor) -> Tensor:
        """Ascending survivors by the last query row of [1, H, S, S], mean over heads."""
        scores = attention[0, :, -1].float().mean(0)[visual]
        best = visual[scores.topk(round(len(visual) * (1 - self._r))).indices]
        keep = torch.ones(attention.shape[-1], dtype=torch.bool, device=attention.device)
        keep[visual] = False
        keep[best] = True
        return torch.nonzero(keep)[:, 0]
