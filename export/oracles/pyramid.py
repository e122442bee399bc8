"""PyramidDrop a second time, from the paper's rules (arXiv 2410.17247); positions stay as they were.

Before a stage's layer, the layer itself is asked, on all tokens that are left and nothing else, what its last token
looks at; the best of the visual tokens stay, as many as the stage's share of all of them. Transformers' own layers are
called one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, run_layer
from vlmtrim.export.oracles.fastv import attention, watch
from vlmtrim.export.oracles.rules import Seen, load_rule


class Oracle:
    """``selection``: ``stages`` and ``score``."""

    def __init__(self, selection: Mapping[str, Any]):
        self._stages, self._rule = selection["stages"], load_rule(selection["score"])

    def layers(self, text: Any, cache: Any, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Kept]:
        """(hidden states [1, T, D] of the survivors, their ascending indices); ``hidden`` [1, S, D]."""
        depth, tokens = len(text.layers), hidden.shape[1]
        stages = self._stages or [(round(depth * i / 4), 0.5**i) for i in (1, 2, 3)]
        starts = dict(stages)
        left, kept, margins = visual, torch.arange(tokens), torch.full((tokens,), torch.inf)
        seen = Seen(0)
        for index, layer in enumerate(text.layers):
            if index in starts:
                seen.ahead = partial(attention, text, layer, hidden, positions)
                scores = self._rule.rank(seen, left, 0, 0)[1]
                stays, near = _best(scores, round(len(visual) * starts[index]))
                margins[kept[left]] = torch.minimum(margins[kept[left]], near)
                goes = torch.zeros(hidden.shape[1], dtype=torch.bool)
                goes[left[~stays]] = True
                is_visual = torch.zeros_like(goes)
                is_visual[left] = True
                left = torch.nonzero(is_visual[~goes])[:, 0]
                hidden, positions, kept = hidden[:, ~goes], positions[..., ~goes], kept[~goes]
            seen = Seen(layer.self_attn.head_dim, layer.self_attn.scaling)
            handles = watch(layer, seen)
            hidden = run_layer(text, index, cache, hidden, positions)
            for handle in handles:
                handle.remove()
        return hidden, Kept(kept, token_margins=margins)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(which of the scores [N] are among the best ``count``, by how much of the threshold each is from changing)."""
    order = torch.sort(scores, descending=True, stable=True).indices
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[order[:count]] = True
    if not 0 < count < len(scores):
        return stays, torch.full((len(scores),), torch.inf)
    worst, best_left = scores[order[count - 1]], scores[order[count]]
    return stays, torch.where(stays, scores - best_left, worst - scores) / worst.abs()
