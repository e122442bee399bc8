"""VisionZip a second time, from the paper and its rules (arXiv 2412.04467), in loops over pictures and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, run_layer


class Oracle:
    """``selection``: ``r`` and ``contextual``. The decoder's layers are as they are."""

    def __init__(self, selection: Mapping[str, Any]):
        self._r, self._share = selection["r"], selection["contextual"]

    def layers(self, text: Any, cache: Any, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Kept]:
        """(hidden states [1, S, D], nothing chosen)."""
        for index in range(len(text.layers)):
            hidden = run_layer(text, index, cache, hidden, positions)
        return hidden, Kept()

    def features(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Features [N, D] of all pictures, pixel_values [I, 3, H, W]."""
        config, tower = model.config, model.model.vision_tower
        has_class = config.vision_config.model_type == "clip_vision_model"
        if config.vision_feature_select_strategy == "full":
            has_class = False  # the class token is a patch like any other
        layer = config.vision_feature_layer  # of hidden states, the first of which enters layer 0
        number = layer if layer < 0 else layer - 1
        keys: list[Tensor] = []
        inner = getattr(tower, "vision_model", tower)
        handle = inner.encoder.layers[number].self_attn.k_proj.register_forward_hook(lambda *of: keys.append(of[2]))
        try:
            seen = tower(pixel_values, output_hidden_states=True, output_attentions=True)
        finally:
            handle.remove()
        states, attention = seen.hidden_states[layer], seen.attentions[number]
        heads = attention.shape[1]
        kept = [
            self._picture(states[i], attention[i], keys[0][i].unflatten(-1, (heads, -1)).mean(dim=1), has_class)
            for i in range(len(states))
        ]
        return torch.cat([model.model.multi_modal_projector(one[None])[0] for one in kept])

    def _picture(self, states: Tensor, attention: Tensor, keys: Tensor, has_class: bool) -> Tensor:
        """States that stay of one picture's [T, Dv]; ``attention`` [H, T, T], ``keys`` [T, Dh]."""
        patches = list(range(int(has_class), len(states)))
        kept = round(len(patches) * (1 - self._r))
        if kept == len(patches):
            return states[patches]
        merged = min(round(kept * self._share), kept - 1 - has_class)
        summed = attention.sum(dim=0)
        paid = summed[0] if has_class else summed.mean(dim=0)
        best = sorted(patches, key=lambda patch: (-float(paid[patch]), patch))[: kept - merged - has_class]
        result = [states[0]] * has_class + [states[patch] for patch in sorted(best)]
        rest = [patch for patch in patches if patch not in best]
        targets = rest[:: max(1, len(rest) // merged)][:merged] if merged else []
        gathered: dict[int, list[Tensor]] = {target: [] for target in targets}
        for patch in rest if targets else []:
            if patch not in gathered:
                near = [float(torch.cosine_similarity(keys[patch], keys[target], dim=0)) for target in targets]
                gathered[targets[near.index(max(near))]].append(states[patch])
        for target, others in gathered.items():
            result.append(states[target] + torch.stack(others).mean(dim=0) if others else states[target])
        return torch.stack(result)
