"""CLIP and SigLIP towers as LLaVA models use them: which hidden states feed the projector, and how many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.text_decoder import Shape
from vlmtrim.graphs.contract import GraphSpec, TensorSpec

VISION_MODELS = ("clip_vision_model", "siglip_vision_model")
CLIP_LARGE = {  # the tower of LLaVA-1.5 and LLaVA-1.6: CLIP-L/14 at 336 (Radford et al. 2021)
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
# A checkpoint's files have the names that transformers used when the models came out.
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def tile_tokens(config: Any) -> int:
    """Features that the tower makes of one square tile, checked. Raises Refusal."""
    vision: Any = config.vision_config
    if vision.model_type not in VISION_MODELS:
        raise Refusal(
            f"the vision tower is {vision.model_type!r}; "
            f"the {config.model_type} family exports {', '.join(VISION_MODELS)}"
        )
    side = vision.image_size // vision.patch_size
    has_class_token = vision.model_type == "clip_vision_model"
    if config.vision_feature_select_strategy == "default" and not has_class_token:
        # transformers drops the first token whatever it is; so do we.
        return side * side - 1
    return side * side + int(has_class_token and config.vision_feature_select_strategy == "full")


def tile_features(full: Any, pixel_values: Tensor) -> Tensor:
    """pixel_values [T, 3, H, W] -> projected features [T, P, D]; layers and strategy as the config says."""
    states = chosen_states(full.model.vision_tower, full.config, pixel_values)
    if full.config.vision_feature_select_strategy == "default":
        states = states[:, 1:]
    return full.model.multi_modal_projector(states)


def chosen_states(tower: Any, config: Any, pixel_values: Tensor) -> Tensor:
    """pixel_values [T, 3, H, W] -> states of the layers that feed the projector, side by side, [T, tokens, n C]."""
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    return torch.cat(chosen, dim=-1) if len(chosen) > 1 else chosen[0]


def tiny_vision_config(vision: str = "clip_vision_model") -> Any:
    """Config of a random tower small enough for tests: a tile of 56 x 56 pixels, 4 x 4 patches."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return AutoConfig.for_model(vision, **settings, **({"projection_dim": 128} if vision == VISION_MODELS[0] else {}))


def vision_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx`` where every picture is one square of the same size."""
    return GraphSpec(
        "vision.onnx",
        (TensorSpec("pixel_values", dtype, ("I", 3, shape.image_size, shape.image_size)),),
        (TensorSpec("image_features", dtype, ("I", shape.image_tokens, shape.hidden)),),
    )


def vision_dims(shape: Shape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures."""
    return {"I": (1, images)}
