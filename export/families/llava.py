"""LLaVA-1.5 as transformers defines it: CLIP or SigLIP tower, MLP projector, Llama / Vicuna / Mistral / Qwen2 decoder.

Graphs (D hidden width, P visual tokens per image; dims as in :mod:`vlmtrim.graphs.contract`)

    vision   pixel_values [I, 3, H, W]                                       -> image_features [I, P, D]
    embed    input_ids [B, S], image_features [B, N, D], visual_positions [B, N] -> inputs_embeds [B, S, D]
    decoder  see the contract
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmtrim.export.tracing.text_decoder import Shape, text_numbers, text_plans
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import CLIP_LARGE, tile_features, tile_tokens, tiny_vision_config
from vlmtrim.export.tracing.vision_tower import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.vision_tower import vision_dims as vision_dims
from vlmtrim.export.tracing.vision_tower import vision_spec as vision_spec
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import PATCHES, TOKENS, GraphSpec

MODEL_CLASS = LlavaForConditionalGeneration
PRUNES = (TOKENS, PATCHES)  # what methods remove of its pictures
PRESETS = {"llava-7b": "llava-hf/llava-1.5-7b-hf", "llava-13b": "llava-hf/llava-1.5-13b-hf"}
SIZES: dict[str, dict[str, Any]] = {  # Liu et al. 2023: Vicuna v1.5 with 64 rows more in the embedding
    "llava-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llava-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
SPECIALS = {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}  # of the published tokenizer


def read_shape(config: LlavaConfig) -> Shape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    vision: Any = config.vision_config
    tokens, side = tile_tokens(config), vision.image_size // vision.patch_size
    return Shape(
        **text_numbers(config),
        image_size=vision.image_size,
        image_tokens=tokens,
        image_grid=(side, side) if tokens == side * side else None,
    )


class Vision(nn.Module):
    """Vision tower and projector."""

    def __init__(self, full: LlavaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [I, 3, H, W] -> image features [I, P, D]."""
        return tile_features(self.full, pixel_values)


def plans(full: LlavaForConditionalGeneration, shape: Shape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    pixels = torch.zeros(2, 3, shape.image_size, shape.image_size, dtype=dtype)
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    return [
        Plan(Vision(full), (pixels,), ({0: Dim("I", max=1024)},), spec),
        *text_plans(full, shape, dtype, decoder),
    ]


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    heads = SIZES[like]["num_attention_heads"]
    text = {
        "model_type": "llama",
        **SIZES[like],
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": SPECIALS["<image>"],
        "pad_token_id": SPECIALS["<pad>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": CLIP_LARGE,
    }


def tiny_config(
    text: str = "llama", vision: str = "clip_vision_model", heads: int = 4, kv_heads: int = 2, layers: int = 4
) -> LlavaConfig:
    """Config of a random checkpoint small enough for tests: head size 64, 16 visual tokens per image."""
    is_clip = vision == "clip_vision_model"
    settings: dict[str, Any] = {"image_token_id": 259}
    return LlavaConfig(
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text(text, heads, kv_heads, layers),
        **settings,
        vision_feature_select_strategy="default" if is_clip else "full",
        vision_feature_layer=-2 if is_clip else -1,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: LlavaConfig) -> None:
    """Image-processor and processor settings that suit a config."""
    tower: Any = config.vision_config
    size, is_clip = tower.image_size, tower.model_type == "clip_vision_model"
    common = {"do_resize": True, "resample": 3, "do_convert_rgb": True}
    if is_clip:
        settings = {
            **common,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            **tiny.CLIP_COLOURS,
        }
    else:
        settings = {
            **common,
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            **tiny.HALF_COLOURS,
        }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1 if is_clip else 0,
    }
    tiny.write_settings(folder, settings, processor)
