"""InternVL3 and InternVL3.5 as transformers defines them: an InternViT tower on square tiles, Qwen2, Qwen3 or Llama.

A picture is stretched to the grid of tiles that is nearest to its proportions and cut; the whole picture, squeezed into
one more tile, comes last where there are several. Of four patches that lie together one token is made (pixel shuffle),
so tokens follow each other tile by tile and row by row, and no gather is needed. Graphs (T tiles of all pictures of a
step, P tokens of a tile, D hidden width)

    vision   pixel_values [T, 3, H, W] -> image_features [P T, D]

How many tiles a picture may become is a setting of the image processor, which a bundle lowers to what it takes
(:func:`adapt_settings`). A frame of a video is one tile (:mod:`vlmtrim.runtime.processors.internvl`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import InternVLConfig, InternVLForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_decoder import text_numbers, text_plans
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.tiles import TiledShape
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import TOKENS, Contract, GraphSpec, TensorSpec

MODEL_CLASS = InternVLForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "internvl3-14b": "OpenGVLab/InternVL3-14B-hf",
    "internvl3-38b": "OpenGVLab/InternVL3-38B-hf",
    "internvl3-78b": "OpenGVLab/InternVL3-78B-hf",
    "internvl3.5-1b": "OpenGVLab/InternVL3_5-1B-HF",
    "internvl3.5-2b": "OpenGVLab/InternVL3_5-2B-HF",
    "internvl3.5-4b": "OpenGVLab/InternVL3_5-4B-HF",
    "internvl3.5-8b": "OpenGVLab/InternVL3_5-8B-HF",
    "internvl3.5-14b": "OpenGVLab/InternVL3_5-14B-HF",
    "internvl3.5-38b": "OpenGVLab/InternVL3_5-38B-HF",
}
# Text model, hidden, MLP, layers, heads, key-value heads, vocabulary. As in the config.json of the presets (Zhu et al.
# 2025, Wang et al. 2025): Qwen2.5 or Qwen3; 38B and 78B have the tower of 6 billion, the others that of 300 million.
SIZES = {
    "internvl3-1b": ("qwen2", 896, 4864, 24, 14, 2, 151674),
    "internvl3-2b": ("qwen2", 1536, 8960, 28, 12, 2, 151674),
    "internvl3-8b": ("qwen2", 3584, 18944, 28, 28, 4, 151674),
    "internvl3-14b": ("qwen2", 5120, 13824, 48, 40, 8, 151674),
    "internvl3-38b": ("qwen2", 5120, 27648, 64, 40, 8, 151674),
    "internvl3-78b": ("qwen2", 8192, 29568, 80, 64, 8, 151674),
    "internvl3.5-1b": ("qwen3", 1024, 3072, 28, 16, 8, 151936),
    "internvl3.5-2b": ("qwen3", 2048, 6144, 28, 16, 8, 151936),
    "internvl3.5-4b": ("qwen3", 2560, 9728, 36, 32, 8, 151936),
    "internvl3.5-8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "internvl3.5-14b": ("qwen3", 5120, 17408, 40, 40, 8, 151936),
    "internvl3.5-38b": ("qwen3", 5120, 25600, 64, 64, 8, 151936),
}
SPECIALS = {"<s>": 151643, "</s>": 151645}  # of the published tokenizers, whose names differ
IMAGE_TOKENS = {"qwen2": 151667, "qwen3": 151671}  # of the published tokenizers
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
MOST_TILES = 12  # max_patches of the published checkpoints; the squeezed picture comes on top
MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")  # start_image_token and so on, in the order of ROLES
ROLES = ("start_image_token", "end_image_token", "context_image_token", "video_token")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}{% else %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def read_shape(config: InternVLConfig) -> TiledShape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    vision: Any = config.vision_config
    (height, width), (tall, wide) = vision.image_size, vision.patch_size
    side, ratio = height // tall, config.downsample_ratio
    if height != width or tall != wide:
        raise Refusal(f"tiles are {height} x {width} pixels in patches of {tall} x {wide}; the family exports squares")
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise Refusal(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r} and vision_feature_layer "
            f"{config.vision_feature_layer!r}; pixel shuffle needs 'default', without the class token, and one layer"
        )
    rows = side * ratio
    if not 0 < ratio <= 1 or rows != int(rows) or (1 / ratio) % 1:
        raise Refusal(f"downsample_ratio is {ratio}; give a divisor's inverse, so that {side} patches a side divide")
    tokens = int(rows) ** 2
    return TiledShape(
        **text_numbers(config),
        image_size=height,
        image_tokens=(MOST_TILES + 1) * tokens,
        any_size=True,
        image_grid=(int(rows), int(rows)),
        tile_tokens=tokens,
        most_tiles=MOST_TILES + 1,
    )


class Vision(nn.Module):
    """Tower, pixel shuffle and projector, transformers' own."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W] -> image features [P T, D]."""
        return self.full.model.get_image_features(pixel_values).pooler_output.flatten(0, 1)


def vision_spec(shape: TiledShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    return GraphSpec(
        "vision.onnx",
        (TensorSpec("pixel_values", dtype, ("T", 3, shape.image_size, shape.image_size)),),
        (TensorSpec("image_features", dtype, (f"{shape.tile_tokens}*T", shape.hidden)),),
    )


def vision_dims(shape: TiledShape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures of full size.

    Raises Refusal where a picture may not even be one tile.
    """
    if shape.image_tokens < shape.tile_tokens:
        raise Refusal(
            f"a picture may have {shape.image_tokens} tokens, one tile alone has {shape.tile_tokens}; give a larger "
            "--image-tokens or --max-seq-len, or fewer --images"
        )
    return {"T": (1, images * (shape.image_tokens // shape.tile_tokens))}


def plans(
    full: InternVLForConditionalGeneration, shape: TiledShape, dtype: torch.dtype, decoder: GraphSpec
) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    vision: Any = full.config.vision_config
    layer: Any = full.config.vision_feature_layer
    used = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer  # state 0 enters the first layer
    norms = 2 * used * ((vision.norm_type == "rms_norm") + vision.use_qk_norm)
    pixels = torch.zeros(3, 3, shape.image_size, shape.image_size, dtype=dtype)
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    plan = Plan(Vision(full), (pixels,), ({0: Dim("T", max=4096)},), spec, fusions={"RMSNormalization": norms})
    return [plan, *text_plans(full, shape, dtype, decoder)]


def adapt_settings(folder: Path, contract: Contract) -> None:
    """Lower the tiles of a picture in a bundle's image-processor settings to what the contract allows.

    Whoever reads the settings, transformers included, then prepares pictures that the bundle takes.
    """
    assert contract.image_grid is not None
    rows, columns = contract.image_grid
    most = max(1, contract.image_tokens // (rows * columns) - 1)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text())
        settings = content.get("image_processor") if name == "processor_config.json" else content
        if settings:
            settings["max_patches"] = min(settings.get("max_patches") or MOST_TILES, most)
            settings["min_patches"] = min(settings.get("min_patches") or 1, most)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    kind, hidden, mlp, layers, heads, kv_heads, vocabulary = SIZES[like]
    is_qwen3, is_large = kind == "qwen3", like.endswith(("38b", "78b"))
    text = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 40960 if is_qwen3 else 32768,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        **({"head_dim": 128} if is_qwen3 else {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    }
    width, inner, depth, rows = (3200, 12800, 45, 25) if is_large else (1024, 4096, 24, 16)
    vision = {
        "model_type": "internvl_vision",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": rows,
        "attention_bias": not is_large,
        "use_qk_norm": is_large,
        "norm_type": "rms_norm" if is_large else "layer_norm",
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": IMAGE_TOKENS[kind],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


def tiny_config(
    text: str = "qwen2", large: bool = False, heads: int = 4, kv_heads: int = 2, layers: int = 4
) -> InternVLConfig:
    """Config of a random checkpoint small enough for tests: tiles of 4 tokens; ``large``: the large tower's norms."""
    return InternVLConfig(
        text_config=tiny_text(text, heads, kv_heads, layers),
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": not large,
            "use_qk_norm": large,
            "norm_type": "rms_norm" if large else "layer_norm",
            "image_size": 56,
            "patch_size": 14,
        },
        image_token_id=262,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def write_tiny_processor(folder: Path, config: InternVLConfig) -> None:
    """Tokenizer with the marks of pictures, chat template and processor settings that suit a config."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    ends = {"<s>": text.bos_token_id, "</s>": text.eos_token_id}
    first = config.image_token_id - 2  # as published: the start, the end, then the token itself
    tiny.write_tokenizer(folder, {**ends, **{mark: first + i for i, mark in enumerate(MARKS)}}, image_token=MARKS[2])
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "extra_special_tokens": dict(zip(ROLES, MARKS, strict=True))}
    path.write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    height, width = vision.image_size
    scaling = {"size": {"height": height, "width": width}, "resample": 3}
    frames = {"video_processor_type": "InternVLVideoProcessor", **scaling, **tiny.HALF_COLOURS}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(frames, indent=2))
    tiny.write_settings(
        folder,
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": False,  # as published; the processor says true whatever stands here
            "min_patches": 1,
            "max_patches": MOST_TILES,
            **scaling,
            **tiny.CLIP_COLOURS,
        },
        {"processor_class": "InternVLProcessor", "image_seq_length": config.image_seq_length},
    )
