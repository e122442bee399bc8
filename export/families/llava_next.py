"""LLaVA-NeXT (LLaVA-1.6) as transformers defines it: LLaVA on tiles of the picture at its own aspect ratio.

A picture is scaled into the pinpoint resolution that wastes least and cut into square tiles; the whole picture,
squeezed into one more tile, comes first. What the padding beside the picture became is dropped, and every row of
patches ends with one learned newline token. Which feature goes where depends on the sizes of the pictures alone, so the
host says it (:mod:`vlmtrim.runtime.processors.llava_next`) and the graph gathers (:mod:`vlmtrim.export.tracing.tiles`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_decoder import text_numbers, text_plans
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.tiles import TiledShape, TiledVision, tile_grids, vision_plan
from vlmtrim.export.tracing.tiles import vision_dims as vision_dims
from vlmtrim.export.tracing.tiles import vision_spec as vision_spec
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import CLIP_LARGE, tile_features, tiny_vision_config
from vlmtrim.export.tracing.vision_tower import OLD_NAMES as OLD_NAMES
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import TOKENS, GraphSpec

MODEL_CLASS = LlavaNextForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-34b": "llava-hf/llava-v1.6-34b-hf",
    "llava-next-72b": "llava-hf/llava-next-72b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-next-llama3-8b": "llava-hf/llama3-llava-next-8b-hf",
}
SIZES: dict[str, dict[str, Any]] = {  # Liu et al. 2024: Mistral 7B, Nous Hermes 2 Yi 34B and Qwen 1.5 72B
    "llava-next-mistral-7b": {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": 32064,
    },
    "llava-next-34b": {
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rope_theta": 5e6,
        "vocab_size": 64064,
    },
    "llava-next-72b": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "vocab_size": 152064,
    },
}
SPECIALS = {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}  # of the tokenizer of the smallest


def read_shape(config: LlavaNextConfig) -> TiledShape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    side, grids = tile_grids(config)
    return TiledShape(
        **text_numbers(config),
        image_size=config.vision_config.image_size,  # type: ignore[union-attr]
        # a picture that fills its tiles: every patch, and a newline a row
        image_tokens=side * side + max(rows * side * (columns * side + 1) for rows, columns in grids),
        image_grid=(side, side),
        tile_tokens=side * side,
        most_tiles=1 + max(rows * columns for rows, columns in grids),
    )


class Vision(TiledVision):
    """One learned feature: the newline token."""

    def table(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W] -> [T P + 1, D]."""
        features = tile_features(self.full, pixel_values).flatten(0, 1)
        return torch.cat((features, self.full.model.image_newline[None]))


def plans(
    full: LlavaNextForConditionalGeneration, shape: TiledShape, dtype: torch.dtype, decoder: GraphSpec
) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    return [vision_plan(Vision(full), shape, dtype), *text_plans(full, shape, dtype, decoder)]


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {"rms_norm_eps": 1e-05, "bos_token_id": SPECIALS["<s>"], "eos_token_id": SPECIALS["</s>"], **SIZES[like]}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": SPECIALS["<image>"],
        "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": CLIP_LARGE,
    }


def tiny_config(
    text: str = "llama", vision: str = "clip_vision_model", heads: int = 4, kv_heads: int = 2, layers: int = 4
) -> LlavaNextConfig:
    """Config of a random checkpoint small enough for tests: tiles of 16 patches, 16 to 88 visual tokens a picture."""
    is_clip = vision == "clip_vision_model"
    tower = tiny_vision_config(vision)
    one, two, three = (count * tower.image_size for count in (1, 2, 3))
    settings: dict[str, Any] = {"image_token_index": 259}
    return LlavaNextConfig(
        vision_config=tower,
        text_config=tiny_text(text, heads, kv_heads, layers),
        **settings,
        image_grid_pinpoints=[[one, two], [two, one], [two, two], [three, one], [one, three]],
        vision_feature_select_strategy="default" if is_clip else "full",
        vision_feature_layer=-2 if is_clip else -1,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: LlavaNextConfig) -> None:
    """Image-processor and processor settings that suit a config."""
    tower: Any = config.vision_config
    size, is_clip = tower.image_size, tower.model_type == "clip_vision_model"
    settings = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        **tiny.CLIP_COLOURS,
        "do_pad": True,
    }
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": "<image>",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1 if is_clip else 0,
    }
    tiny.write_settings(folder, settings, processor)
