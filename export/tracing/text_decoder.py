"""The language model's half of a family: token embedding and decoder as traced modules, their boundaries and plans.

Any transformers model with ``lm_head`` fits whose decoder (``get_decoder()``) is one of
:mod:`vlmtrim.export.tracing.text_models`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.attention import StaticCache
from vlmtrim.export.tracing.text_models import PLAIN, text_model
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.graphs.contract import DEEPSTACK, GraphSpec, TensorSpec


@dataclass(frozen=True)
class Shape:
    """The numbers of a checkpoint that the contract needs, read from its config alone.

    ``any_size``: pictures keep their proportions, and ``image_tokens`` is the most that the model takes of one.
    ``position_axes``: numbers that a token's position consists of. ``cross_layers``: layers that attend to pictures.
    ``deepstack``: first layers behind which features are added to visual tokens. ``sees_ahead``: whether visual tokens
    attend to those of their picture that are behind them. ``near_layers``: layers that see the last ``window`` entries.
    """

    hidden: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_size: int
    max_positions: int
    image_size: int
    image_tokens: int
    image_token_id: int
    image_grid: tuple[int, int] | None
    any_size: bool = False
    video_token_id: int | None = None
    position_axes: int = 1
    cross_layers: tuple[int, ...] = ()
    deepstack: int = 0
    sees_ahead: bool = False
    near_layers: tuple[int, ...] = ()
    window: int = 0


def text_numbers(config: Any, models: Sequence[str] = PLAIN) -> dict[str, Any]:
    """The fields of Shape that the language model, one of ``models``, decides, checked. Raises Refusal."""
    text: Any = config.text_config
    if text.model_type not in models:
        raise Refusal(
            f"the text model is {text.model_type!r}; the {config.model_type} family exports {', '.join(models)}"
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise Refusal(f"image_token_id {config.image_token_id} lies outside the vocabulary of {text.vocab_size}")
    return {
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "layers": text.num_hidden_layers,
        "kv_heads": text.num_key_value_heads or text.num_attention_heads,
        "head_size": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "max_positions": text.max_position_embeddings,
        "image_token_id": config.image_token_id,
    }


class Embed(nn.Module):
    """Token embedding with the image features merged in."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(self, input_ids: Tensor, image_features: Tensor, visual_positions: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B, S], features [B, N, (1 + n) D] -> embeddings [B, S, D], in which their first D replace the
        tokens at visual_positions [B, N], and, where n > 0, [B, S, n D]: the others there, zeros elsewhere."""
        embeds = self.full.get_decoder().embed_tokens(input_ids)
        # expanded by hand: the exporter's own broadcast of [B, 1] and [B, 0] is [B, 1]
        rows = torch.arange(visual_positions.shape[0])[:, None].expand(visual_positions.shape)
        at, width = (rows, visual_positions), embeds.shape[2]
        merged = embeds.index_put(at, image_features[:, :, :width])
        if image_features.shape[2] == width:
            return (merged,)
        none = torch.zeros_like(embeds[:, :, :1]).expand(-1, -1, image_features.shape[2] - width)
        return merged, none.index_put(at, image_features[:, :, width:])


class Decoder(nn.Module):
    """Language model and head, prefill and decode alike."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        write_indices: Tensor,
        key_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """The contract's decoder without selection; returns logits [B, V] and the flat list of caches."""
        return self.run(inputs_embeds, position_ids, last_index, write_indices, key_positions, past)

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        write_indices: Tensor,
        key_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
        last_seen: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """The same; ``last_seen`` [B, S] is the last token that each one attends to, itself where it is None; ``more``
        is what :meth:`states` takes beside it."""
        tokens = torch.arange(inputs_embeds.shape[1])
        own = write_indices[:, None] + tokens
        last = own if last_seen is None else write_indices[:, None] + last_seen
        visible = key_positions[None, None, :] <= last[:, :, None]
        mask = self.mask(visible, own, key_positions, inputs_embeds.dtype)
        cache = StaticCache(past, write_indices, key_positions.shape[0])
        hidden = self.states(inputs_embeds, position_ids, mask, cache, **more)
        index = last_index[:, None, None].expand(-1, 1, hidden.shape[2])
        logits = self.full.lm_head(hidden.gather(1, index)[:, 0])
        return logits, [tensor for pair in cache.present for tensor in pair]

    def mask(self, visible: Tensor, own: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Any:
        """Additive [B, 1, S, W]: 0 where a token sees an entry, ``visible`` [B, S, W].

        Families whose layers differ return what those take; ``own`` [B, S] are the tokens' slots, ``key_positions`` [W]
        those of the entries.
        """
        return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]

    def states(self, embeds: Tensor, position_ids: Tensor, mask: Any, cache: StaticCache) -> Tensor:
        """Normed states [B, S, D] behind the last layer; ``mask`` as :meth:`mask` makes it."""
        return self.full.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def embed_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``embed.onnx``."""
    added = shape.deepstack * shape.hidden
    returned = [TensorSpec("inputs_embeds", dtype, ("B", "S", shape.hidden))]
    returned += [TensorSpec(DEEPSTACK, dtype, ("B", "S", added))] * bool(added)
    return GraphSpec(
        "embed.onnx",
        (
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("image_features", dtype, ("B", "N", shape.hidden + added)),
            TensorSpec("visual_positions", "int64", ("B", "N")),
        ),
        tuple(returned),
    )


def text_plans(
    full: Any, shape: Shape, dtype: torch.dtype, decoder: GraphSpec, kind: type[nn.Module] = Decoder
) -> list[Plan]:
    """How to trace ``embed.onnx`` and the decoder, a ``kind``; ``decoder`` is the boundary before any selection."""
    name = str(dtype).removeprefix("torch.")
    rows, tokens, visual, window = 2, 5, 3, 7
    layers = range(shape.layers)
    rotary = full.get_decoder().rotary_emb
    if rotary.rope_type == "dynamic":  # the frequencies change beyond max_position_embeddings alone, which is refused
        rotary.rope_type = "default"
    capacity = next(int(t.shape[2]) for t in decoder.inputs if t.name.startswith("past_key_values"))
    batch = Dim("B", max=1024)
    sequence, keys = Dim("S", max=capacity), Dim("W0", max=capacity)

    # torch.export takes equal objects for one input: every tensor below is its own.
    def cache() -> Tensor:
        return torch.zeros((), dtype=dtype).expand(rows, shape.kv_heads, capacity, shape.head_size)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.int64)

    def states(length: int, parts: int) -> Tensor:
        return torch.zeros(rows, length, parts * shape.hidden, dtype=dtype)

    added = [states(tokens, shape.deepstack)] * (shape.deepstack > 0) + [zeros(rows, tokens)] * shape.sees_ahead
    axes = () if shape.position_axes == 1 else (shape.position_axes,)
    return [
        Plan(
            Embed(full),
            (zeros(rows, tokens), states(visual, 1 + shape.deepstack), zeros(rows, visual)),
            ({0: batch, 1: sequence}, {0: batch, 1: Dim("N", max=capacity)}, {0: batch, 1: Dim("N", max=capacity)}),
            embed_spec(shape, name),
        ),
        Plan(
            kind(full),
            (
                states(tokens, 1),
                zeros(*axes, rows, tokens),
                zeros(rows),
                *added,
                zeros(rows),
                zeros(window),
                [(cache(), cache()) for _ in layers],
            ),
            (
                {0: batch, 1: sequence},
                {len(axes): batch, len(axes) + 1: sequence},
                {0: batch},
                *({0: batch, 1: sequence} for _ in added),
                {0: batch},
                {0: keys},
                [({0: batch}, {0: batch}) for _ in layers],
            ),
            decoder,
            fusions=text_model(full.config).fusions(shape.layers),
        ),
    ]
