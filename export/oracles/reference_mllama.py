"""Llama-3.2-Vision in transformers as it is, with or without a selection that an oracle of this folder makes.

Nothing here shares code with the graphs or the runtime. Pictures and the cross-attention mask of the whole conversation
come from the checkpoint's own Hugging Face processor; the layers are transformers' own modules with eager attention.
What an oracle chooses in the first cross-attention layer is what the others and all caches get.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, DynamicCache
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from vlmtrim.export.oracles import causal, load_oracle
from vlmtrim.export.oracles.formats import unpacked
from vlmtrim.runtime.measure.check import Recording, Turn


class Reference:
    """One conversation on the unpatched model, batch 1, float32.

    Args:
        model_class: transformers class of the checkpoint.
        folder: checkpoint, or a bundle (which is one); its own Hugging Face processor prepares the pictures.
        selection: the contract's selection, ``method`` and its parameters, or None for the plain forward.
    """

    def __init__(self, model_class: Any, folder: Path, selection: dict[str, Any] | None):
        with unpacked(folder) as plain:
            self.model = model_class.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32).eval()
        self._text: Any = self.model.model.language_model
        self._processor: Any = AutoProcessor.from_pretrained(folder).image_processor
        self._oracle = None if selection is None else load_oracle(selection)
        self._features = self.model.model.vision_model.num_patches
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._cache = DynamicCache()
        self._ids: list[int] = []
        self._tiles: list[int] = []
        self._held = torch.zeros(0, dtype=torch.int64)  # numbers of the features in the caches, over all pictures

    @torch.no_grad()
    def record(self, turn: Turn, steps: int) -> tuple[Recording, list[int]]:
        """Run a turn and ``steps`` greedy tokens; returns the recording and the tokens that were fed."""
        if turn.opens:
            self.reset()
        pictures: dict[str, Any] = {}
        if turn.images:
            pictures = dict(self._processor([list(turn.images)], return_tensors="pt"))
            self._tiles += pictures.pop("num_tiles")[0]
        self._margins: Tensor | None = None
        logits, kept = self._forward(turn.ids, pictures)
        margins = None if self._margins is None else self._margins.numpy()
        caches = [self._contents(index) for index in range(len(self._text.layers))]
        all_logits, tokens = [logits], []
        for _ in range(steps):
            tokens.append(int(all_logits[-1].argmax()))
            all_logits.append(self._forward([tokens[-1]], {})[0])
        return Recording(kept, caches, torch.stack(all_logits).numpy(), margins=margins), tokens

    def _contents(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        layer: Any = self._cache.layers[index] if index < len(self._cache.layers) else None
        if layer is None or not layer.is_initialized:
            config = self._text.config
            empty = np.zeros((config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads))
            return empty, empty
        return layer.keys[0].numpy().copy(), layer.values[0].numpy().copy()

    def _forward(self, ids: list[int], pictures: dict[str, Tensor]) -> tuple[Tensor, np.ndarray | None]:
        """(logits [V] of the last token, kept features of this step)."""
        positions = torch.arange(len(self._ids), len(self._ids) + len(ids))[None]
        self._ids += ids
        tokens = torch.tensor([ids])
        mask = self._mask()[:, -len(ids) :] if self._tiles else None
        if self._oracle is None:
            output = self.model(
                input_ids=tokens,
                **pictures,
                cross_attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
            return output.logits[0, -1], None
        features = torch.zeros(1, 0, self._text.config.hidden_size)
        if pictures:
            states = self.model.model.vision_model(**pictures).last_hidden_state
            features = self.model.model.multi_modal_projector(states).flatten(1, 3)
        hidden, kept = self._layers(self._text.embed_tokens(tokens), positions, features, mask)
        return self.model.lm_head(self._text.norm(hidden))[0, -1], kept.numpy()

    def _mask(self) -> Tensor:
        """Which tiles each token of the conversation sees, [1, tokens, pictures, T]."""
        spans = get_cross_attention_token_mask(self._ids, self.model.config.image_token_index)
        most = self._processor.max_image_tiles
        return torch.from_numpy(
            convert_sparse_cross_attention_mask_to_dense([spans], [self._tiles], most, len(self._ids))
        )

    def _layers(
        self, hidden: Tensor, positions: Tensor, features: Tensor, tiles: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(hidden states, kept features); ``features`` [1, N, D] of this step, ``tiles`` the mask of its tokens."""
        assert self._oracle is not None
        kept = torch.zeros(0, dtype=torch.int64)
        cross = sorted(self._text.cross_attention_layers)
        additive = rows = torch.zeros(0)
        if tiles is not None:
            additive, rows = _prepare_cross_attention_mask(tiles, self._features, hidden.dtype)  # type: ignore[arg-type]
            visible = tiles.repeat_interleave(self._features, dim=3).flatten(2)[0].bool()
            new = torch.arange(visible.shape[1] - features.shape[1], visible.shape[1])
        for index, layer in enumerate(self._text.layers):
            if index not in cross:
                past = self._cache.get_seq_length(index)
                hidden = layer(
                    hidden,
                    attention_mask=causal(hidden.shape[1], past),
                    position_embeddings=self._text.rotary_emb(hidden, positions),
                    past_key_values=self._cache,
                )
            elif tiles is not None:
                is_first = index == cross[0]
                columns = torch.cat([self._held, new]) if is_first else self._held
                given = features if is_first else features[:, kept]
                output, attention = self._cross(layer, hidden, given, additive[..., columns], rows)
                blind = visible.any(1) & ~visible[:, columns].any(1)  # sees pictures, but nothing of them was kept
                hidden = torch.where(blind[None, :, None] | (len(columns) == 0), hidden, output)
                if is_first and len(new):
                    alive = torch.tensor(self._alive())[new]
                    paid = attention[0, :, rows[0, 0, :, 0] > 0, -len(new) :].sum(1)
                    kept, self._margins = self._oracle.choose(paid, alive)
                    cached: Any = self._cache.layers[index]
                    entries = torch.cat([torch.arange(len(self._held)), len(self._held) + kept])
                    cached.keys, cached.values = cached.keys[:, :, entries], cached.values[:, :, entries]
                    self._held = torch.cat([self._held, new[kept]])
        return hidden, kept

    def _cross(self, layer: Any, hidden: Tensor, given: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(output, attention probabilities) of a cross-attention layer."""
        seen: list[Tensor] = []
        handle = layer.cross_attn.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        try:
            output = layer(
                hidden,
                cross_attention_states=given if given.shape[1] else None,
                cross_attention_mask=mask,
                attention_mask=None,
                full_text_row_masked_out_mask=rows,
                past_key_values=self._cache,
            )
        finally:
            handle.remove()
        return output, seen[0]

    def _alive(self) -> list[bool]:
        """Whether each feature of the conversation is of a tile that a picture fills."""
        most = self._processor.max_image_tiles
        return [tile < filled for filled in self._tiles for tile in range(most) for _ in range(self._features)]
