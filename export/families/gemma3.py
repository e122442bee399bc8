"""Gemma 3 as transformers defines it: a SigLIP tower whose patches are pooled, and layers of two kinds.

Of every six layers five see the last ``sliding_window`` entries of their caches, and one sees all; each kind has
frequencies of its own. A picture's tokens attend to each other both ways, in the window too. Graphs (P tokens of a
picture, the means of squares of patches; D hidden width)

    vision   pixel_values [I, 3, H, W] -> image_features [I, P, D]
    decoder  with last_seen, see the contract

The window counts entries that are there: behind a selection a token sees as many survivors. Still pictures, without pan
and scan.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing import text_decoder
from vlmtrim.export.tracing.text_decoder import Shape, text_numbers, text_plans
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.vision_tower import vision_dims as vision_dims
from vlmtrim.export.tracing.vision_tower import vision_spec as vision_spec
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import TOKENS, Contract, GraphSpec

MODEL_CLASS = Gemma3ForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
WITHOUT = {  # methods that do not go with it, and why
    "tidal": "reads fewer entries of the caches, of which most of its layers see a window alone",
    "zipvl": "judges tokens by those behind them alone, and a picture's tokens attend to each other both ways",
}
PRESETS = {
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
}
# Hidden, MLP, layers, heads, key and value heads, head size, query_pre_attn_scalar. As in the config.json of the
# presets (Gemma Team 2025, arXiv 2503.19786); 1B has no tower.
SIZES = {
    "gemma3-4b": (2560, 10240, 34, 8, 4, 256, 256),
    "gemma3-12b": (3840, 15360, 48, 16, 8, 256, 256),
    "gemma3-27b": (5376, 21504, 62, 32, 16, 128, 168),
}
SPECIALS = {"<s>": 2, "</s>": 1, "<pad>": 0}  # of the published tokenizer, whose names differ
MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TURNS = ("<start_of_turn>", "<end_of_turn>")
ROPES = ("default", "linear")
CHAT_TEMPLATE = (  # of the published form: no role for the system text, which begins the first question
    "{{ bos_token }}{% set told = messages[0]['role'] == 'system' %}{% for message in messages[told | int:] %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{% if told and loop.first %}{{ messages[0]['content'][0]['text'] + '\\n\\n' }}{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def read_shape(config: Gemma3Config) -> Shape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    numbers = text_numbers(config, ("gemma3_text",))
    patches, tokens = vision.image_size // vision.patch_size, int(config.mm_tokens_per_image or 0)
    side = math.isqrt(tokens)
    if vision.model_type != "siglip_vision_model":
        raise Refusal(f"the vision tower is {vision.model_type!r}; the gemma3 family exports siglip_vision_model")
    if not tokens or side * side != tokens or patches % side:
        raise Refusal(
            f"mm_tokens_per_image is {tokens}; give the square of a number that divides {patches} patches a side"
        )
    if text.use_bidirectional_attention:
        raise Refusal("use_bidirectional_attention is true; answers are written word by word, which sees no later ones")
    for kind in set(text.layer_types):
        rope = text.rope_parameters[kind]["rope_type"]
        if rope not in ROPES:
            raise Refusal(f"rope_type of {kind} is {rope!r}; the gemma3 family exports {', '.join(ROPES)}")
    return Shape(
        **numbers,
        image_size=vision.image_size,
        image_tokens=tokens,
        image_grid=(side, side),
        sees_ahead=True,
        near_layers=tuple(index for index, kind in enumerate(text.layer_types) if kind == "sliding_attention"),
        window=text.sliding_window,
    )


class Vision(nn.Module):
    """Tower, pooling and projector, transformers' own."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [I, 3, H, W] -> image features [I, P, D]."""
        return self.full.model.get_image_features(pixel_values).pooler_output


class Decoder(text_decoder.Decoder):
    """Transformers' layers under two masks."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        last_seen: Tensor,
        write_indices: Tensor,
        key_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """As :class:`text_decoder.Decoder` has it, with last_seen [B, S]."""
        arguments = inputs_embeds, position_ids, last_index, write_indices, key_positions, past
        return self.run(*arguments, last_seen=last_seen)

    def mask(self, visible: Tensor, own: Tensor, key_positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of both kinds of layers."""
        near = key_positions > (own - self.full.config.text_config.sliding_window)[:, :, None]
        seen = {"full_attention": visible, "sliding_attention": visible & near}
        return {kind: super(Decoder, self).mask(of, own, key_positions, dtype) for kind, of in seen.items()}


def plans(full: Any, shape: Shape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    pixels = torch.zeros(2, 3, shape.image_size, shape.image_size, dtype=dtype)
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    vision = Plan(Vision(full), (pixels,), ({0: Dim("I", max=1024)},), spec, fusions={"RMSNormalization": 1})
    return [vision, *text_plans(full, shape, dtype, decoder, Decoder)]


def adapt_settings(folder: Path, contract: Contract) -> None:
    """Turn pan and scan off in a bundle's image-processor settings, and say so: its crops are pictures of their own."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text())
        settings = content.get("image_processor") if name == "processor_config.json" else content
        if settings and settings.get("do_pan_and_scan"):
            settings["do_pan_and_scan"] = False
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
            print(
                "warning: the checkpoint's settings cut pictures into crops (do_pan_and_scan), which the bundle does "
                "not: give crops as further pictures",
                file=sys.stderr,
            )


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    hidden, mlp, layers, heads, kv_heads, size, scalar = SIZES[like]
    text = {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "query_pre_attn_scalar": scalar,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "text_config": text,
        "vision_config": vision,
    }


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, every: int = 2) -> Gemma3Config:
    """Config of a random checkpoint small enough for tests: 16 visual tokens a picture, a window of 24 entries; each
    ``every``th layer sees all."""
    text = {**tiny_text("gemma3_text", heads, kv_heads, layers), "hidden_size": 48 * heads, "eos_token_id": [257, 260]}
    return Gemma3Config(
        text_config={**text, "sliding_window_pattern": every},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16,
        boi_token_index=261,
        eoi_token_index=262,
        image_token_index=263,
    )


def write_tiny_processor(folder: Path, config: Gemma3Config) -> None:
    """Tokenizer with the marks of turns and pictures, chat template and processor settings that suit a config."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    marks = {"<s>": text.bos_token_id, "</s>": SPECIALS["</s>"], "<pad>": text.pad_token_id}
    if isinstance(text.eos_token_id, list):
        marks["</s>"] = text.eos_token_id[0]
    places: list[Any] = [config.boi_token_index, config.eoi_token_index, config.image_token_index]
    marks |= dict(zip(MARKS.values(), places, strict=True))
    marks |= {token: places[0] - 2 + i for i, token in enumerate(TURNS)}
    tiny.write_tokenizer(folder, marks, image_token=MARKS["image_token"])
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "extra_special_tokens": MARKS}
    path.write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tiny.write_settings(
        folder,
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "do_resize": True,
            "size": {"height": vision.image_size, "width": vision.image_size},
            "resample": 2,
            "do_pan_and_scan": None,
            **tiny.HALF_COLOURS,
        },
        {"processor_class": "Gemma3Processor", "image_seq_length": config.mm_tokens_per_image},
    )
