"""FastV a second time, from the paper's rules (arXiv 2403.06764).

Score = a rule of ``rules/`` on layer k-1; before layer k the ``round(N (1 - r))`` best visual tokens stay, and all
others, in order, with their original positions. Transformers' own layers are called one after the other, so that hidden
states can be gathered in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, causal, run_layer, tables
from vlmtrim.export.oracles.rules import Seen, load_rule


class Oracle:
    """``selection``: ``k``, ``r``, ``seed`` and ``score``; ``side``, of a picture's grid where all are alike."""

    def __init__(self, selection: Mapping[str, Any]):
        self._side = selection.get("side")
        self.vision: Tensor | None = None
        self._k, self._r, self._seed = selection["k"], selection["r"], selection["seed"]
        self._rule = load_rule(selection["score"])
        self.looks = getattr(self._rule, "LOOKS", False)

    def layers(self, text: Any, cache: Any, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Kept]:
        """(hidden states [1, T, D] of the survivors, their ascending indices); ``hidden`` [1, S, D]."""
        kept = torch.arange(hidden.shape[1])
        watched = text.layers[max(self._k - 1, 0)]
        seen = Seen(
            watched.self_attn.head_dim,
            watched.self_attn.scaling,
            embeds=hidden[0],
            positions=positions.squeeze(-2),
            removed=self._r,
            vision=self.vision,
            side=self._side,
        )
        handles = watch(watched, seen)
        try:
            for index, layer in enumerate(text.layers):
                if index == self._k:
                    seen.seam = hidden[0]
                    seen.ahead = partial(attention, text, layer, hidden, positions)
                    seen.rotated = cache.layers[index - 1].keys[0][:, -hidden.shape[1] :] if index else None
                    kept = self._choose(seen, visual, hidden.shape[1])
                    hidden, positions = hidden[:, kept], positions[..., kept]
                hidden = run_layer(text, index, cache, hidden, positions)
        finally:
            for handle in handles:
                handle.remove()
        return hidden, Kept(kept)

    def _choose(self, seen: Seen, visual: Tensor, tokens: int) -> Tensor:
        """Ascending indices that survive."""
        count = round(len(visual) * (1 - self._r))
        first, scores = self._rule.rank(seen, visual, count, self._seed)
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        ranked = [*first, *(index for index in order if index not in set(first))]
        winners = visual[sorted(ranked[:count])]
        is_text = torch.ones(tokens, dtype=torch.bool)
        is_text[visual] = False
        return torch.cat([torch.nonzero(is_text)[:, 0], winners]).sort().values


def watch(layer: Any, seen: Seen) -> list[Any]:
    """Hooks that note what a layer does, to be removed."""
    attention = layer.self_attn
    parts = dict(attention.named_children())

    def note(name: str, part: str) -> Any:
        norm = parts.get(f"{part}_norm", lambda heads: heads)  # of single heads, if any

        def projected(_: Any, __: Any, output: Tensor) -> None:
            setattr(seen, name, norm(output[0].unflatten(1, (-1, attention.head_dim))).flatten(1))

        return parts[f"{part}_proj"].register_forward_hook(projected)

    return [
        attention.register_forward_hook(lambda _, __, output: setattr(seen, "attention", output[1][0])),
        note("query", "q"),
        note("key", "k"),
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: setattr(seen, "entered", args[0][0])),
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, output: setattr(seen, "normed", output[0])),
    ]


def attention(text: Any, layer: Any, hidden: Tensor, positions: Tensor) -> Tensor:
    """Probabilities [H, S, S] of a layer on these tokens alone; its hooks and caches see nothing of it."""
    return layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=tables(text, layer.self_attn.layer_idx, hidden, positions),
        attention_mask=causal(hidden.shape[1], 0),
        past_key_values=None,
    )[1][0]
