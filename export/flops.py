"""Multiply-adds of a decoder from its config; how they add up is said in :class:`vlmtrim.graphs.contract.Macs`."""

from __future__ import annotations

from typing import Any

from vlmtrim.graphs.contract import Macs, kept_count

# Fields of text configs whose layers are not all alike, or do not use all their weights for a token.
_UNEVEN = ("num_experts", "num_local_experts")


def decoder_macs(text: Any) -> Macs | None:
    """What the decoder of a transformers text config computes; None where its layers are not all alike.

    A layer: projections of queries, keys, values and output, attention, and the three matrices of a gated MLP; a
    cross-attention layer of Llama-3.2-Vision has the same. FastV's paper counts two MLP matrices (METHODS 1.3), so its
    ratios differ a little.
    """
    if any(getattr(text, name, None) for name in _UNEVEN):
        return None
    heads, width = text.num_attention_heads, text.hidden_size
    size = getattr(text, "head_dim", None) or width // heads
    queries, keys = 2 * width * size * heads, 2 * width * size * text.num_key_value_heads
    return Macs(
        token=queries + keys + 3 * width * text.intermediate_size,
        pair=2 * heads * size,
        logits=width * text.vocab_size,
        written=keys,
    )


def prefill_macs(text: Any, tokens: int, visual: int, k: int, r: float) -> int:
    """Multiply-adds of all layers and of the logits of the last token; ``visual`` of ``tokens`` are visual."""
    macs = decoder_macs(text)
    if macs is None:
        raise ValueError(f"the layers of {type(text).__name__} are not all alike")
    later = tokens - visual + kept_count(visual, r)
    return macs.prefill([(k, tokens), (text.num_hidden_layers - k, later)]) - macs.spared(later, later)
