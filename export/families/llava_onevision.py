"""LLaVA-OneVision as transformers defines it: LLaVA on tiles of a SigLIP tower, Qwen2 inside.

Tiles and newline tokens as :mod:`vlmtrim.export.families.llava_next` has them. Where a picture's patches are more than
those of N tiles (``vision_aspect_ratio`` is ``anyres_max_N``), their grid is resampled to a smaller one: a token is a
weighted sum of four features. The host says which and how much of each
(:mod:`vlmtrim.runtime.processors.llava_onevision`). Graph (T tiles and M visual tokens of all pictures of a step)

    vision   pixel_values [T, 3, H, W], feature_index [M, 4], feature_weights [M, 4] -> image_features [M, D]

Frames of a video are a tile each, resampled to half of its rows and columns; one newline token follows the last.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing import tiles
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_decoder import text_numbers, text_plans
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.tiles import TiledShape
from vlmtrim.export.tracing.tiles import vision_dims as vision_dims
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.vision_tower import tile_features, tiny_vision_config
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import TOKENS, GraphSpec, TensorSpec

MODEL_CLASS = LlavaOnevisionForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava-onevision-72b": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
}
# Hidden, MLP, layers, heads, key-value heads, vocabulary, tied: Qwen2 (Yang et al. 2024) with rows for two marks more.
SIZES = {
    "llava-onevision-0.5b": (896, 4864, 24, 14, 2, 152000, True),
    "llava-onevision-7b": (3584, 18944, 28, 28, 4, 152128, False),
    "llava-onevision-72b": (8192, 29568, 80, 64, 8, 152128, False),
}
SPECIALS = {"<s>": 151643, "</s>": 151645, "<pad>": 151644, "<image>": 151646, "<video>": 151647}  # published places
CORNERS = 4  # patches that a token lies between


def read_shape(config: LlavaOnevisionConfig) -> TiledShape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    side, grids = tiles.tile_grids(config)
    found = re.fullmatch(r"anyres_max_([1-9][0-9]{0,3})", config.vision_aspect_ratio)
    if found is None:
        raise Refusal(f"vision_aspect_ratio is {config.vision_aspect_ratio!r}; expected anyres_max_ and a number")
    most, vision = int(found[1]), config.vision_config
    longest = max(max(grid) for grid in grids)
    if longest > most * side:
        raise Refusal(
            f"image_grid_pinpoints has {longest} tiles in a line, of which {config.vision_aspect_ratio} leaves rows "
            f"without tokens; give resolutions of at most {most * side} tiles in a line"
        )
    return TiledShape(
        **text_numbers(config),
        image_size=vision.image_size,  # type: ignore[union-attr]
        # patches stay as they are up to 1.21 times those of the most tiles; and a newline a row
        image_tokens=side * side + max(min(r * c * side**2, 121 * most * side**2 // 100) + r * side for r, c in grids),
        image_grid=(side, side),
        tile_tokens=side * side,
        most_tiles=1 + max(rows * columns for rows, columns in grids),
        video_token_id=config.video_token_id,
    )


class Vision(tiles.TiledVision):
    """One learned feature: the newline token."""

    def table(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W] -> [T P + 1, D]."""
        features = tile_features(self.full, pixel_values).flatten(0, 1)
        return torch.cat((features, self.full.model.image_newline[None]))

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, feature_index: Tensor, feature_weights: Tensor
    ) -> Tensor:
        """pixel_values [T, 3, H, W], feature_index and feature_weights [M, 4] -> image features [M, D]."""
        table = self.table(pixel_values)
        # one after the other: four features of every token at once would be the largest tensor of all
        parts = [table.index_select(0, feature_index[:, n]) * feature_weights[:, n, None] for n in range(CORNERS)]
        return (parts[0] + parts[1]) + (parts[2] + parts[3])


def vision_spec(shape: TiledShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    plain = tiles.vision_spec(shape, dtype)
    corners = ("M", CORNERS)
    more = TensorSpec("feature_index", "int64", corners), TensorSpec("feature_weights", dtype, corners)
    return dataclasses.replace(plain, inputs=(plain.inputs[0], *more))


def plans(full: Any, shape: TiledShape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    vision = tiles.vision_plan(Vision(full), shape, dtype)
    corners = torch.zeros(7, CORNERS, dtype=torch.int64), torch.zeros(7, CORNERS, dtype=dtype)
    tokens = Dim("M", max=2**20)
    vision = dataclasses.replace(
        vision,
        args=(vision.args[0], *corners),
        dynamic_shapes=(vision.dynamic_shapes[0], {0: tokens}, {0: tokens}),
        spec=vision_spec(shape, str(dtype).removeprefix("torch.")),
    )
    return [vision, *text_plans(full, shape, dtype, decoder)]


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SIZES[like]
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)],
        "image_token_index": SPECIALS["<image>"],
        "video_token_index": SPECIALS["<video>"],
        "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1e6,
            "bos_token_id": SPECIALS["<s>"],
            "eos_token_id": SPECIALS["</s>"],
            "pad_token_id": SPECIALS["<pad>"],
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def tiny_config(
    text: str = "qwen2", vision: str = "siglip_vision_model", heads: int = 4, kv_heads: int = 2, layers: int = 4
) -> LlavaOnevisionConfig:
    """Config of a random checkpoint small enough for tests: tiles of 16 patches, 16 to 105 visual tokens a picture."""
    is_clip = vision == "clip_vision_model"
    tower = tiny_vision_config(vision)
    if not is_clip:
        tower.vision_use_head = False
    sides = [count * tower.image_size for count in (1, 2, 3)]
    settings: dict[str, Any] = {"image_token_index": 259, "video_token_index": 260}
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=tiny_text(text, heads, kv_heads, layers),
        **settings,
        image_grid_pinpoints=[[down, across] for down in sides for across in sides],
        vision_aspect_ratio="anyres_max_4",
        vision_feature_select_strategy="default" if is_clip else "full",
        vision_feature_layer=-2 if is_clip else -1,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: LlavaOnevisionConfig) -> None:
    """Tokenizer with both marks, chat template and processor settings that suit a config."""
    tiny.write_words_with_videos(folder, config)
    tower: Any = config.vision_config
    size, is_clip = tower.image_size, tower.model_type == "clip_vision_model"
    settings = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        **(tiny.CLIP_COLOURS if is_clip else tiny.HALF_COLOURS),
        "do_pad": True,
    }
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (size // tower.patch_size) ** 2 + int(is_clip),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    }
    tiny.write_settings(folder, settings, processor)
