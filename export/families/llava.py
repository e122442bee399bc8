"""LLaVA-1.5 as transformers defines it: CLIP or SigLIP tower, MLP projector, Llama / Vicuna / Mistral / Qwen2 decoder.

Graphs (D hidden width, P visual tokens per image; dims as in :mod:`vlmtrim.graphs.contract`)

    vision   pixel_values [I, 3, H, W]                                       -> image_features [I, P, D]
    embed    input_ids [B, S], image_features [B, N, D], visual_positions [B, N] -> inputs_embeds [B, S, D]
    decoder  see the contract
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmtrim.export.attention import StaticCache
from vlmtrim.export.job import Refusal
from vlmtrim.export.trace import Plan
from vlmtrim.graphs.contract import GraphSpec, TensorSpec

MODEL_CLASS = LlavaForConditionalGeneration
TEXT_MODELS = ("llama", "mistral", "qwen2")
VISION_MODELS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Shape:
    """The numbers of a checkpoint that the contract needs, read from its config alone."""

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


def read_shape(config: LlavaConfig) -> Shape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    if text.model_type not in TEXT_MODELS:
        raise Refusal(f"the text model is {text.model_type!r}; the llava family exports {', '.join(TEXT_MODELS)}")
    if vision.model_type not in VISION_MODELS:
        raise Refusal(f"the vision tower is {vision.model_type!r}; the llava family exports {', '.join(VISION_MODELS)}")
    side = vision.image_size // vision.patch_size
    has_class_token = vision.model_type == "clip_vision_model"
    if config.vision_feature_select_strategy == "default" and not has_class_token:
        # transformers drops the first token whatever it is; so do we.
        tokens = side * side - 1
    else:
        tokens = side * side + (has_class_token and config.vision_feature_select_strategy == "full")
    if not 0 <= config.image_token_id < text.vocab_size:
        raise Refusal(f"image_token_id {config.image_token_id} lies outside the vocabulary of {text.vocab_size}")
    return Shape(
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        max_positions=text.max_position_embeddings,
        image_size=vision.image_size,
        image_tokens=int(tokens),
        image_token_id=config.image_token_id,
        image_grid=(side, side) if tokens == side * side else None,
    )


def sliding_window(config: LlavaConfig) -> int | None:
    """Width of sliding-window attention where the text model uses it."""
    text: Any = config.text_config
    if text.model_type == "qwen2" and not text.use_sliding_window:
        return None
    return getattr(text, "sliding_window", None)


class Vision(nn.Module):
    """Vision tower and projector."""

    def __init__(self, full: LlavaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [I, 3, H, W] -> image features [I, P, D]; layers and strategy as the config says."""
        config, model = self.full.config, self.full.model
        states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return model.multi_modal_projector(torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0])


class Embed(nn.Module):
    """Token embedding with the image features merged in."""

    def __init__(self, full: LlavaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, input_ids: Tensor, image_features: Tensor, visual_positions: Tensor) -> Tensor:
        """input_ids [B, S], features [B, N, D] that replace the tokens at visual_positions [B, N] -> [B, S, D]."""
        embeds = self.full.model.language_model.embed_tokens(input_ids)
        # expanded by hand: the exporter's own broadcast of [B, 1] and [B, 0] is [B, 1]
        rows = torch.arange(visual_positions.shape[0])[:, None].expand(visual_positions.shape)
        return embeds.index_put((rows, visual_positions), image_features)


class Decoder(nn.Module):
    """Language model and head, prefill and decode alike."""

    def __init__(self, full: LlavaForConditionalGeneration):
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
        tokens = torch.arange(inputs_embeds.shape[1])
        query_positions = write_indices[:, None] + tokens
        visible = key_positions[None, None, :] <= query_positions[:, :, None]
        lowest = torch.finfo(inputs_embeds.dtype).min
        mask = torch.where(visible, 0.0, lowest).to(inputs_embeds.dtype)[:, None]
        cache = StaticCache(past, write_indices, key_positions.shape[0])
        hidden = self.full.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        index = last_index[:, None, None].expand(-1, 1, hidden.shape[2])
        logits = self.full.lm_head(hidden.gather(1, index)[:, 0])
        return logits, [tensor for pair in cache.present for tensor in pair]


def vision_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    return GraphSpec(
        "vision.onnx",
        (TensorSpec("pixel_values", dtype, ("I", 3, shape.image_size, shape.image_size)),),
        (TensorSpec("image_features", dtype, ("I", shape.image_tokens, shape.hidden)),),
    )


def vision_dims(shape: Shape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures."""
    return {"I": (1, images)}


def embed_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``embed.onnx``."""
    return GraphSpec(
        "embed.onnx",
        (
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("image_features", dtype, ("B", "N", shape.hidden)),
            TensorSpec("visual_positions", "int64", ("B", "N")),
        ),
        (TensorSpec("inputs_embeds", dtype, ("B", "S", shape.hidden)),),
    )


def plans(full: LlavaForConditionalGeneration, shape: Shape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    name = str(dtype).removeprefix("torch.")
    rows, tokens, visual, window = 2, 5, 3, 7
    layers = range(shape.layers)
    capacity = next(int(t.shape[2]) for t in decoder.inputs if t.name.startswith("past_key_values"))
    batch = Dim("B", max=1024)
    sequence, keys = Dim("S", max=capacity), Dim("W0", max=capacity)

    # torch.export takes equal objects for one input: every tensor below is its own.
    def cache() -> Tensor:
        return torch.zeros((), dtype=dtype).expand(rows, shape.kv_heads, capacity, shape.head_size)

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.int64)

    embeds = torch.zeros(rows, tokens, shape.hidden, dtype=dtype)
    pixels = torch.zeros(2, 3, shape.image_size, shape.image_size, dtype=dtype)
    return [
        Plan(Vision(full), (pixels,), ({0: Dim("I", max=1024)},), vision_spec(shape, name)),
        Plan(
            Embed(full),
            (zeros(rows, tokens), torch.zeros(rows, visual, shape.hidden, dtype=dtype), zeros(rows, visual)),
            ({0: batch, 1: sequence}, {0: batch, 1: Dim("N", max=capacity)}, {0: batch, 1: Dim("N", max=capacity)}),
            embed_spec(shape, name),
        ),
        Plan(
            Decoder(full),
            (
                embeds,
                zeros(rows, tokens),
                zeros(rows),
                zeros(rows),
                zeros(window),
                [(cache(), cache()) for _ in layers],
            ),
            (
                {0: batch, 1: sequence},
                {0: batch, 1: sequence},
                {0: batch},
                {0: batch},
                {0: keys},
                [({0: batch}, {0: batch}) for _ in layers],
            ),
            decoder,
            fusions={"RMSNormalization": 2 * shape.layers + 1, "RotaryEmbedding": 2 * shape.layers},
        ),
    ]


def tiny_config(
    text: str = "llama", vision: str = "clip_vision_model", heads: int = 4, kv_heads: int = 2, layers: int = 4
) -> LlavaConfig:
    """Config of a random checkpoint small enough for tests: head size 64, 16 visual tokens per image."""
    from transformers import AutoConfig

    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    decoder: dict[str, Any] = {
        "hidden_size": 64 * heads,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": 272,
        "max_position_embeddings": 1024,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    }
    if text == "mistral":
        decoder["sliding_window"] = None
    is_clip = vision == "clip_vision_model"
    settings: dict[str, Any] = {"image_token_id": 259}
    return LlavaConfig(
        vision_config=AutoConfig.for_model(vision, **tower, **({"projection_dim": 128} if is_clip else {})),
        text_config=AutoConfig.for_model(text, **decoder),
        **settings,
        vision_feature_select_strategy="default" if is_clip else "full",
        vision_feature_layer=-2 if is_clip else -1,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: LlavaConfig) -> None:
    """Image-processor and processor settings that suit a config."""
    tower: Any = config.vision_config
    size, is_clip = tower.image_size, tower.model_type == "clip_vision_model"
    common = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
        "do_convert_rgb": True,
    }
    if is_clip:
        settings = {
            **common,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    else:
        settings = {
            **common,
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1 if is_clip else 0,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
