"""Multiply-adds of a prefill, counted as it is executed; for reports and plots, nothing depends on them."""

from __future__ import annotations

from typing import Any

from vlmtrim.graphs.contract import kept_count


def layer_macs(text: Any, tokens: int) -> int:
    """Multiply-adds of one decoder layer on ``tokens`` tokens.

    Projections of queries, keys, values and output, the whole S x S attention, and the three matrices of a gated MLP.
    FastV's paper counts two MLP matrices (METHODS 1.3), so its ratios differ a little.

    Args:
        text: text config of a transformers model.
        tokens: S.
    """
    heads, width = text.num_attention_heads, text.hidden_size
    size = getattr(text, "head_dim", None) or width // heads
    projections = 2 * width * size * (heads + text.num_key_value_heads)
    return tokens * (projections + 3 * width * text.intermediate_size) + 2 * tokens * tokens * heads * size


def prefill_macs(text: Any, tokens: int, visual: int, k: int, r: float) -> int:
    """Multiply-adds of all layers and of the logits of the last token; ``visual`` of ``tokens`` are visual."""
    later = tokens - visual + kept_count(visual, r)
    layers = k * layer_macs(text, tokens) + (text.num_hidden_layers - k) * layer_macs(text, later)
    return layers + text.hidden_size * text.vocab_size
