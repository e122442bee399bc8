"""What SmolVLM2 and Idefics3 share: SigLIP tower with positions by place, pixel shuffle, Llama behind words and tiles.

A picture is scaled so that square tiles cover it, cut into them, and squeezed into one more tile, which comes last
(Laurençon et al. 2024, arXiv 2408.12637). All features of all tiles become visual tokens, in that order; between the
tiles the prompt says row and column in words (:mod:`vlmtrim.runtime.processors.idefics3`).

Graph (T tiles of a step, P visual tokens of a tile, D hidden width)

    vision   pixel_values [T, 3, H, W] -> image_features [T P, D]

A frame of a video is a tile of its own, behind its time in words (:mod:`vlmtrim.runtime.processors.smolvlm`; Idefics3
takes none).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.text_decoder import text_numbers, text_plans
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.tiles import TiledShape
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import GraphSpec, TensorSpec

OLD_NAMES: tuple[tuple[str, str], ...] = ()  # transformers' names are the published ones
MOST_TILES = 4 * 4 + 1  # the longer side of a picture is scaled to four tiles at most, as published settings say
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% elif content['type'] == 'video' %}<video>"
    "{% else %}{{ ' ' + content['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def read_shape(config: Any) -> TiledShape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    vision, scale = config.vision_config, config.scale_factor
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise Refusal(f"image_size is {vision.image_size}, patch_size {vision.patch_size}; expected a number each")
    side = vision.image_size // vision.patch_size
    if scale < 1 or side % scale:
        raise Refusal(f"scale_factor {scale} does not divide the {side} x {side} patches of a tile")
    tokens = (side // scale) ** 2
    return TiledShape(
        **text_numbers(config, ("llama",)),
        image_size=vision.image_size,
        image_tokens=MOST_TILES * tokens,
        image_grid=(side // scale, side // scale),
        tile_tokens=tokens,
        most_tiles=MOST_TILES,
    )


class Vision(nn.Module):
    """Tower and connector, on tiles that are seen as a whole."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W] -> image features [T P, D]."""
        tower: Any = self.full.model.vision_model
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(places(tower.embeddings.num_patches_per_side))
        hidden = tower.post_layernorm(tower.encoder(inputs_embeds=hidden).last_hidden_state)
        return self.full.model.connector(hidden).flatten(0, 1)


def places(side: int) -> Tensor:
    """Row of the position table for each patch of a full square, int64 [side * side].

    A patch has the place that its fraction of the side falls into, in float32: where a side has 25 or 41 patches, say,
    rounding puts some a place early; at the sides of published checkpoints (26, 27, 32) each has its own.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    place = torch.bucketize(fractions, bounds, right=True)
    return (place[:, None] * side + place).flatten()


def vision_spec(shape: TiledShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    pixels = TensorSpec("pixel_values", dtype, ("T", 3, shape.image_size, shape.image_size))
    features = "T" if shape.tile_tokens == 1 else f"{shape.tile_tokens}*T"
    return GraphSpec("vision.onnx", (pixels,), (TensorSpec("image_features", dtype, (features, shape.hidden)),))


def vision_dims(shape: TiledShape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures of full size.

    Twice as many fit where none is square.
    """
    return {"T": (1, 2 * images * shape.most_tiles)}


def plans(full: Any, shape: TiledShape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    pixels = torch.zeros(3, 3, shape.image_size, shape.image_size, dtype=dtype)
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    vision = Plan(Vision(full), (pixels,), ({0: Dim("T", max=4096)},), spec)
    return [vision, *text_plans(full, shape, dtype, decoder)]


def published(name: str, sizes: Any, specials: dict[str, int], text: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a ``model_type``.

    Args:
        sizes: in the order of the families' SIZES.
        specials: ids of the tokenizer's special tokens.
        text: what else the text model has.
    """
    (hidden, mlp, layers, heads, kv_heads), (width, inner, depth, views, pixels, patch), scale = sizes
    own = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "rms_norm_eps": 1e-05,
        "bos_token_id": specials["<s>"],
        "eos_token_id": specials["</s>"],
        "pad_token_id": specials["<pad>"],
        "tie_word_embeddings": False,
        **text,
    }
    tower = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": views,
        "image_size": pixels,
        "patch_size": patch,
    }
    return {
        "model_type": name,
        "image_token_id": specials["<image>"],
        "scale_factor": scale,
        "tie_word_embeddings": False,
        "text_config": own,
        "vision_config": tower,
    }


def tiny_settings(heads: int, kv_heads: int, layers: int, tied: bool) -> dict[str, Any]:
    """Settings of a random checkpoint small enough for tests: head size 64."""
    return {
        "text_config": tiny_text("llama", heads, kv_heads, layers),
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        "image_token_id": 259,
        "scale_factor": 2,
        "tie_word_embeddings": tied,
    }


def write_tiny_processor(folder: Path, config: Any, name: str) -> None:
    """Tokenizer with the marks of tiles, chat template and settings of the processor classes of this name."""
    text, shape = config.text_config, read_shape(config)
    marks = {"<s>": text.bos_token_id, "</s>": text.eos_token_id, "<pad>": text.pad_token_id}
    marks["<image>"] = config.image_token_id
    free = (token for token in reversed(range(text.vocab_size)) if token not in marks.values())
    most = 3 if shape.image_size < 100 else 4
    rows = [f"<row_{row}_col_{column}>" for row in range(1, most + 1) for column in range(1, most + 1)]
    for mark in ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows):
        marks[mark] = next(free)
    tiny.write_tokenizer(folder, marks)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "image_processor_type": f"{name}ImageProcessor",
        "size": {"longest_edge": most * shape.image_size},
        "max_image_size": {"longest_edge": shape.image_size},
        "resample": 1,
        "do_image_splitting": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": True,
        **tiny.HALF_COLOURS,
    }
    processor = {"processor_class": f"{name}Processor", "image_seq_len": shape.tile_tokens}
    tiny.write_settings(folder, settings, processor)
