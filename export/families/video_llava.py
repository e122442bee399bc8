"""Video-LLaVA (Lin et al. 2023, arXiv 2311.10122) as transformers defines it: LLaVA with a second tower for frames.

A picture goes through one tower and loses its class token; every frame of a video goes through the other and keeps it.
Both share the projector. Graph (T pictures, F frames, M visual tokens of a step, P patches, D hidden width)

    vision   pixel_values [T, 3, H, W], frame_values [F, 3, H, W], feature_index [M] -> image_features [M, D]

``feature_index`` (int64) counts the features of all pictures, P each, and goes on with those of the frames, 1 + P each.
A step without pictures, or without frames, brings one black square in their place, whose features nobody chooses:
graphs take no empty inputs, and a square costs little beside the decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.text_decoder import Shape, text_numbers, text_plans
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import CLIP_LARGE, chosen_states, tiny_vision_config
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import TOKENS, GraphSpec, TensorSpec

MODEL_CLASS = VideoLlavaForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {"video-llava-7b": "LanguageBind/Video-LLaVA-7B-hf"}
SIZES: dict[str, dict[str, Any]] = {  # Vicuna v1.5 7B
    "video-llava-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
}
SPECIALS = {"<s>": 1, "</s>": 2, "<image>": 32000, "<video>": 32001, "<pad>": 32002}  # of the published tokenizer
FRAMES = 8  # that the model was trained on
OLD_NAMES = (  # of the checkpoint's files
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.image_tower.", "image_tower.vision_model."),
    ("model.video_tower.", "video_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def read_shape(config: VideoLlavaConfig) -> Shape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    vision: Any = config.vision_config
    if vision.model_type != "clip_vision_model" or config.vision_feature_select_strategy != "default":
        raise Refusal(
            f"the towers are {vision.model_type!r} with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r}; the video_llava family exports clip_vision_model, 'default'"
        )
    side = vision.image_size // vision.patch_size
    return Shape(
        **text_numbers(config),
        image_size=vision.image_size,
        image_tokens=FRAMES * (1 + side * side),  # of a video; a picture has fewer
        image_grid=(side, side),
        any_size=True,
        video_token_id=config.video_token_id,
    )


class Vision(nn.Module):
    """Two towers, one projector, and the order of what they make."""

    def __init__(self, full: VideoLlavaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor, frame_values: Tensor, feature_index: Tensor) -> Tensor:
        """Shapes as at the top of this module."""
        config, model = self.full.config, self.full.model
        pictures = chosen_states(model.image_tower, config, pixel_values)[:, 1:]
        frames = chosen_states(model.video_tower, config, frame_values)
        table = torch.cat((pictures.flatten(0, 1), frames.flatten(0, 1)))
        return model.multi_modal_projector(table.index_select(0, feature_index))


def vision_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    square = (3, shape.image_size, shape.image_size)
    return GraphSpec(
        "vision.onnx",
        (
            TensorSpec("pixel_values", dtype, ("T", *square)),
            TensorSpec("frame_values", dtype, ("F", *square)),
            TensorSpec("feature_index", "int64", ("M",)),
        ),
        (TensorSpec("image_features", dtype, ("M", shape.hidden)),),
    )


def vision_dims(shape: Shape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions: pictures, or frames, of ``images`` times the bound's tokens."""
    assert shape.image_grid is not None
    tokens, patches = images * shape.image_tokens, shape.image_grid[0] * shape.image_grid[1]
    most = max(tokens, 1 + patches)
    return {"T": (1, most // patches), "F": (1, most // (1 + patches)), "M": (patches, most)}


def plans(full: VideoLlavaForConditionalGeneration, shape: Shape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    squares = [torch.zeros(count, 3, shape.image_size, shape.image_size, dtype=dtype) for count in (2, 3)]
    inputs = (*squares, torch.zeros(7, dtype=torch.int64))
    dims = ({0: Dim("T", max=1024)}, {0: Dim("F", max=1024)}, {0: Dim("M", max=2**20)})
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    return [Plan(Vision(full), inputs, dims, spec), *text_plans(full, shape, dtype, decoder)]


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {
        "model_type": "llama",
        **SIZES[like],
        "num_key_value_heads": SIZES[like]["num_attention_heads"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
        "pad_token_id": SPECIALS["<pad>"],
    }
    return {
        "architectures": ["VideoLlavaForConditionalGeneration"],
        "model_type": "video_llava",
        "image_token_index": SPECIALS["<image>"],
        "video_token_index": SPECIALS["<video>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {**CLIP_LARGE, "image_size": 224},
    }


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4) -> VideoLlavaConfig:
    """Config of a random checkpoint small enough for tests: 16 visual tokens a picture, 17 a frame."""
    return VideoLlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text("llama", heads, kv_heads, layers),
        image_token_index=259,
        video_token_index=260,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: VideoLlavaConfig) -> None:
    """Tokenizer with both marks, chat template and processor settings that suit a config."""
    tiny.write_words_with_videos(folder, config)
    tower: Any = config.vision_config
    settings = {
        "image_processor_type": "VideoLlavaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": tower.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": tower.image_size, "width": tower.image_size},
        **tiny.CLIP_COLOURS,
    }
    processor = {
        "processor_class": "VideoLlavaProcessor",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    tiny.write_settings(folder, settings, processor)
