"""Many questions about one picture in one pass, each seeing exactly what it would see alone.

Shapes: B pictures, N visual tokens, P prefix tokens (everything up to the end of the picture), Q questions a picture,
L tokens a question with its answer, D text width, H heads, K head size. A packed row is the prefix, then Q blocks of L
tokens. A block attends to the prefix and to itself, and its positions start at P, so every block's hidden states are
those of the prompt that holds this question only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlavaForConditionalGeneration

ATTENTION = "packed_questions"


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[B, 3, SIZE, SIZE] -> [B, N, D], as the model's get_image_features: the tower without its unused last layer."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return model.model.multi_modal_projector(hidden[:, 1:])


def block_states(
    model: LlavaForConditionalGeneration,
    prefix: Tensor,
    visual: Tensor,
    blocks: Tensor,
    watch: dict[int, Tensor] | None = None,
) -> Tensor:
    """Last hidden states of the questions, [B, Q, L, D].

    `prefix` [P] are the token ids up to the end of the picture, `visual` [B, N, D] replaces its image tokens, and
    `blocks` [B, Q, L] are the token ids of the questions. For every layer number that is a key of `watch`, the blocks'
    attention to the prefix, averaged over heads, is put there: [B, Q, L, P].
    """
    decoder = model.model.language_model
    batch, count, length = blocks.shape
    start = decoder.embed_tokens(prefix)
    first = int((prefix == model.config.image_token_id).nonzero()[0])
    head, tail = start[:first], start[first + visual.shape[1] :]
    hidden = torch.cat(
        [
            head.expand(batch, -1, -1),
            visual,
            tail.expand(batch, -1, -1),
            decoder.embed_tokens(blocks).flatten(1, 2),
        ],
        dim=1,
    )
    inside = torch.arange(len(prefix), len(prefix) + length)
    positions = torch.cat([torch.arange(len(prefix)), inside.repeat(count)])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    packed = {"prefix_length": len(prefix), "blocks": count, "watch": watch or {}}
    for layer in decoder.layers:
        hidden = layer(hidden, None, positions, position_embeddings=rotary, **packed)
    return decoder.norm(hidden[:, len(prefix) :]).unflatten(1, (count, length))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """Attention of a packed row: query, key and value are [B, H, P + Q*L, K]; the result is [B, P + Q*L, H, K]."""
    prefix_length, count = kwargs["prefix_length"], kwargs["blocks"]
    prefix_query, prefix_key, prefix_value = (part[:, :, :prefix_length] for part in (query, key, value))
    over_prefix = scaled_dot_product_attention(prefix_query, prefix_key, prefix_value, is_causal=True, scale=scaling)

    block_query, block_key, block_value = (
        part[:, :, prefix_length:].unflatten(2, (count, -1)) for part in (query * scaling, key, value)
    )
    length = block_query.shape[3]
    to_prefix = (block_query.flatten(2, 3) @ prefix_key.transpose(-1, -2)).unflatten(2, (count, length))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    to_block = (block_query @ block_key.transpose(-1, -2)).masked_fill(future, float("-inf"))
    weights = torch.cat([to_prefix, to_block], dim=-1).softmax(-1)
    if module.layer_idx in kwargs["watch"]:
        kwargs["watch"][module.layer_idx] = weights[..., :prefix_length].mean(1)
    over_blocks = (weights[..., :prefix_length].flatten(2, 3) @ prefix_value).unflatten(2, (count, length))
    over_blocks = over_blocks + weights[..., prefix_length:] @ block_value
    return torch.cat([over_prefix, over_blocks.flatten(2, 3)], dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
