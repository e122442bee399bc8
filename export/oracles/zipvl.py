"""ZipVL a second time, from the paper's rules (arXiv 2410.08584), as attention under masks.

Every layer attends twice in transformers' own module: over this step's tokens alone, for the probe rows, and over the
cache and all of the step's tokens with those that do not stay masked; then the cache forgets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import Kept, added, causal


class Oracle:
    """``selection``: ``tau``, ``bound``, ``budgets``, ``recent`` and ``spread``."""

    def __init__(self, selection: Mapping[str, Any]):
        self._tau, self._recent, self._spread = selection["tau"], selection["recent"], selection["spread"]
        self._bound, self._budgets = selection["bound"], selection["budgets"]

    def layers(self, text: Any, cache: Any, hidden: Tensor, positions: Tensor, visual: Tensor) -> tuple[Tensor, Kept]:
        """(hidden states [1, S, D], what each layer kept); ``hidden`` [1, S, D]."""
        tokens, kept, margins = hidden.shape[1], [], []
        rotary = text.rotary_emb(hidden, positions)
        for index, layer in enumerate(text.layers):
            normed = layer.input_layernorm(hidden)
            seen = layer.self_attn(
                hidden_states=normed, position_embeddings=rotary, attention_mask=causal(tokens, 0), past_key_values=None
            )[1][0]
            stays, near = self._choose(seen.mean(0), visual, index)
            past = cache.get_seq_length(index)
            mask = causal(tokens, past)
            mask[..., past:].masked_fill_(~stays, torch.finfo(torch.float32).min)
            output = layer.self_attn(
                hidden_states=normed, position_embeddings=rotary, attention_mask=mask, past_key_values=cache
            )[0]
            entries = torch.cat([torch.arange(past), past + torch.nonzero(stays)[:, 0]])
            held = cache.layers[index]
            held.keys, held.values = held.keys[:, :, entries], held.values[:, :, entries]
            hidden = hidden + output * stays[None, :, None]
            hidden = added(text, index, hidden + layer.mlp(layer.post_attention_layernorm(hidden)), positions)
            kept.append(torch.nonzero(stays)[:, 0])
            margins.append(near)
        return hidden, Kept(layers=kept, margins=margins)

    def _choose(self, attention: Tensor, visual: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(bool [S]: stays; margin of every visual token [N]) by the mean attention [S, S] of one layer.

        The margin is what would have to change, relative to the threshold, for the token to change sides: its own
        score, or the attention that the budget counts where one token more or less would decide about it.
        """
        tokens, count = len(attention), len(visual)
        rows = list(range(tokens))
        if tokens > self._recent + self._spread:
            rest = tokens - self._recent
            rows = [i * rest // self._spread for i in range(self._spread)] + rows[rest:]
        probed = attention[rows]
        paid = probed.sum(0)[visual]
        score = paid / torch.tensor([max(1, sum(row >= int(token) for row in rows)) for token in visual])
        share = self._budgets or self._bound
        limit = int(count * (share[index] if isinstance(share, list | tuple) else share) + 1e-9)
        wanted, slack = limit, torch.full((count + 1,), torch.inf)
        if self._budgets is None:
            given_up = torch.cumsum(torch.sort(paid).values, 0)
            spare = (1 - self._tau) * len(rows)
            wanted = count - int((given_up <= spare).sum())
            slack = torch.cat([torch.zeros(1), given_up]).sub(spare).abs() / len(rows)  # by how many are given up
        score = torch.where(visual == tokens - 1, torch.inf, score)
        wanted = min(limit, max(wanted, int((visual == tokens - 1).any())))
        order = torch.sort(score, descending=True, stable=True).indices
        stays = torch.ones(tokens, dtype=torch.bool)
        stays[visual[order[wanted:]]] = False
        return stays, self._margins(score, order, wanted, limit, slack)

    @staticmethod
    def _margins(score: Tensor, order: Tensor, wanted: int, limit: int, slack: Tensor) -> Tensor:
        margins, count = torch.full((len(score),), torch.inf), len(score)
        if 0 < wanted < count:
            worst, best = score[order[wanted - 1]], score[order[wanted]]
            margins[order[:wanted]] = (score[order[:wanted]] - best) / worst
            margins[order[wanted:]] = (worst - score[order[wanted:]]) / worst
        # Rank i stays while the smallest count - i sums to more than may be given up.
        margins[order[:limit]] = margins[order[:limit]].minimum(slack[count - torch.arange(limit)])
        return margins
