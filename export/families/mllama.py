"""Llama-3.2-Vision as transformers defines it: tiled vision encoder, Llama decoder with gated cross-attention layers.

Graphs (D hidden width, T tiles per picture, P features per picture: T times patches and a class token of a tile)

    vision   pixel_values [I, T, 3, H, W], aspect_ratio_ids [I], aspect_ratio_mask [I, T] -> image_features [I, P, D]
    embed    input_ids [B, S]                                                             -> inputs_embeds [B, S, D]
    decoder  see the contract; the caches of the cross-attention layers are a group of their own

A token sees the pictures that ``seen_images`` says. transformers treats one that sees none in two ways, and so does
this graph: where the caches hold no feature at all, it skips the layer; where there are some, of pictures that come
later in the prompt, it attends to all of them, filling included, and only the layer's MLP is switched off
(``full_text_row_masked_out_mask``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import MllamaConfig, MllamaForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing import text_decoder
from vlmtrim.export.tracing.attention import StaticCache
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import IMAGES, GraphSpec, TensorSpec

MODEL_CLASS = MllamaForConditionalGeneration
PRUNES = IMAGES  # what methods remove of its pictures
PRESETS = {
    "llama-3.2-11b-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama-3.2-90b-vision": "meta-llama/Llama-3.2-90B-Vision-Instruct",
}
SIZES: dict[str, dict[str, Any]] = {  # Llama Team 2024, arXiv 2407.21783, section 7: Llama 3.1 and cross-attention
    "llama-3.2-11b-vision": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    },
}
SPECIALS = {"<s>": 128000, "</s>": 128001, "<pad>": 128004, "<image>": 128256}  # the last behind the vocabulary
# A checkpoint's files have the names that transformers used when the models came out.
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# As the published models' template: the start token, headers, pictures where they stand, no space around a turn.
TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\\n\\n' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>' }}{% else %}{{ content['text'] | trim }}{% endif %}"
    "{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape(text_decoder.Shape):
    """A picture takes ``tiles`` tiles."""

    tiles: int = 1


def read_shape(config: MllamaConfig) -> Shape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    text: Any = config.text_config
    vision: Any = config.vision_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise Refusal(f"the tiles are {vision.image_size} with patches {vision.patch_size}; both must be one number")
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    cross = tuple(sorted(text.cross_attention_layers))
    if not cross or cross[-1] >= text.num_hidden_layers:
        raise Refusal(f"cross_attention_layers are {list(cross)}, the decoder has {text.num_hidden_layers} layers")
    return Shape(
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        cross_layers=cross,
        kv_heads=text.num_key_value_heads,
        head_size=text.hidden_size // text.num_attention_heads,
        max_positions=text.max_position_embeddings,
        image_size=vision.image_size,
        tiles=vision.max_num_tiles,
        image_tokens=vision.max_num_tiles * patches,
        image_token_id=config.image_token_index,
        image_grid=None,
    )


class Vision(nn.Module):
    """Vision encoder and projector."""

    def __init__(self, full: MllamaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        """pixel_values [I, T, 3, H, W], ids [I], mask [I, T] -> image features [I, P, D], tile by tile."""
        model = self.full.model
        states = model.vision_model(
            pixel_values=pixel_values[:, None],
            aspect_ratio_ids=aspect_ratio_ids[:, None],
            aspect_ratio_mask=aspect_ratio_mask[:, None],
        ).last_hidden_state
        return model.multi_modal_projector(states[:, 0].flatten(1, 2))


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, full: MllamaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, S] -> [B, S, D]."""
        return self.full.model.language_model.embed_tokens(input_ids)


class Decoder(nn.Module):
    """Language model and head, prefill and decode alike; transformers' layers one after the other."""

    def __init__(self, full: MllamaForConditionalGeneration):
        super().__init__()
        self.full = full

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        image_features: Tensor,
        image_numbers: Tensor,
        seen_images: Tensor,
        write_tokens: Tensor,
        key_positions: Tensor,
        past_tokens: list[tuple[Tensor, Tensor]],
        write_images: Tensor,
        key_images: Tensor,
        past_images: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The contract's decoder without selection; returns logits [B, V] and the caches of both groups."""
        text: Any = self.full.model.language_model
        lowest = torch.finfo(inputs_embeds.dtype).min
        query_positions = write_tokens[:, None] + torch.arange(inputs_embeds.shape[1])
        causal = key_positions[None, None, :] <= query_positions[:, :, None]
        slots = write_images[:, None] + torch.arange(image_features.shape[1])
        numbers = key_images.scatter(1, slots, image_numbers)[:, None]  # of every entry in the window, [B, 1, W]
        visible = (numbers >= seen_images[:, :, :1]) & (numbers < seen_images[:, :, 1:])
        attends = visible.any(-1, keepdim=True)
        sees = (attends & (seen_images[:, :, :1] >= 0)).to(inputs_embeds.dtype)

        def additive(mask: Tensor) -> Tensor:
            return torch.where(mask, 0.0, lowest).to(inputs_embeds.dtype)[:, None]

        causal_mask, cross_mask = additive(causal), additive(visible)
        # A layer asks for its caches by its number among all layers.
        own = [index for index in range(len(text.layers)) if index not in text.cross_attention_layers]
        cross = sorted(text.cross_attention_layers)
        tokens = StaticCache(_by_layer(own, past_tokens), write_tokens, key_positions.shape[0])
        images = StaticCache(_by_layer(cross, past_images), write_images, key_images.shape[1])
        hidden = inputs_embeds
        rotary = text.rotary_emb(hidden, position_ids=position_ids)
        for index, layer in enumerate(text.layers):
            if index in own:
                hidden = layer(hidden, attention_mask=causal_mask, position_embeddings=rotary, past_key_values=tokens)
                continue
            changed = layer(
                hidden,
                cross_attention_states=image_features,
                cross_attention_mask=cross_mask,
                attention_mask=causal_mask,
                full_text_row_masked_out_mask=sees[:, None],
                past_key_values=images,
            )
            hidden = torch.where(attends, changed, hidden)
        hidden = text.norm(hidden)
        index = last_index[:, None, None].expand(-1, 1, hidden.shape[2])
        logits = self.full.lm_head(hidden.gather(1, index)[:, 0])
        return logits, _flat(tokens, own), _flat(images, cross)


def _flat(cache: StaticCache, layers: list[int]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in cache.present[layer]]


def _by_layer(layers: list[int], past: list[tuple[Tensor, Tensor]]) -> Any:
    """Caches of some layers as a list that is indexed by layer."""
    places: list[Any] = [None] * (max(layers) + 1)
    for layer, pair in zip(layers, past, strict=True):
        places[layer] = pair
    return places


def vision_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    size = shape.image_size
    return GraphSpec(
        "vision.onnx",
        (
            TensorSpec("pixel_values", dtype, ("I", shape.tiles, 3, size, size)),
            TensorSpec("aspect_ratio_ids", "int64", ("I",)),
            TensorSpec("aspect_ratio_mask", "int64", ("I", shape.tiles)),
        ),
        (TensorSpec("image_features", dtype, ("I", shape.image_tokens, shape.hidden)),),
    )


def vision_dims(shape: Shape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures."""
    return {"I": (1, images)}


def embed_spec(shape: Shape, dtype: str) -> GraphSpec:
    """Boundary of ``embed.onnx``."""
    return GraphSpec(
        "embed.onnx",
        (TensorSpec("input_ids", "int64", ("B", "S")),),
        (TensorSpec("inputs_embeds", dtype, ("B", "S", shape.hidden)),),
    )


def plans(full: MllamaForConditionalGeneration, shape: Shape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    name = str(dtype).removeprefix("torch.")
    rows, pictures, tokens = 2, 2, 5
    pixels = torch.zeros(pictures, shape.tiles, 3, shape.image_size, shape.image_size, dtype=dtype)
    images, sequence = Dim("I", max=1024), Dim("S", max=shape.max_positions)
    return [
        Plan(
            Vision(full),
            (pixels, _zeros(pictures), _zeros(pictures, shape.tiles)),
            ({0: images}, {0: images}, {0: images}),
            vision_spec(shape, name),
        ),
        Plan(Embed(full), (_zeros(rows, tokens),), ({0: Dim("B", max=1024), 1: sequence},), embed_spec(shape, name)),
        _decoder_plan(full, shape, dtype, decoder),
    ]


def _decoder_plan(full: Any, shape: Shape, dtype: torch.dtype, spec: GraphSpec) -> Plan:
    rows, tokens, features, window, entries = 2, 5, 3, 7, 9
    capacity = {int(t.name.split(".")[1]): int(t.shape[2]) for t in spec.inputs if t.name.endswith(".key")}
    cross = shape.cross_layers
    own = [layer for layer in range(shape.layers) if layer not in cross]

    # torch.export takes equal objects for one input: every tensor is its own.
    def cache(layer: int) -> Tensor:
        return torch.zeros((), dtype=dtype).expand(rows, shape.kv_heads, capacity[layer], shape.head_size)

    def caches(layers: Any) -> list[tuple[Tensor, Tensor]]:
        return [(cache(layer), cache(layer)) for layer in layers]

    def states(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, shape.hidden, dtype=dtype)

    batch, sequence, brought = Dim("B", max=1024), Dim("S", max=capacity[own[0]]), Dim("N", max=capacity[cross[0]])
    keys, held = Dim("W0", max=capacity[own[0]]), Dim("W1", max=capacity[cross[0]])
    by_row, by_token, by_feature = {0: batch}, {0: batch, 1: sequence}, {0: batch, 1: brought}
    arguments: list[tuple[Any, Any]] = [
        (states(rows, tokens), by_token),
        (_zeros(rows, tokens), by_token),
        (_zeros(rows), by_row),
        (states(rows, features), by_feature),
        (_zeros(rows, features), by_feature),
        (_zeros(rows, tokens, 2), by_token),
        (_zeros(rows), by_row),
        (_zeros(window), {0: keys}),
        (caches(own), [(by_row, by_row) for _ in own]),
        (_zeros(rows), by_row),
        (_zeros(rows, entries), {0: batch, 1: held}),
        (caches(cross), [(by_row, by_row) for _ in cross]),
    ]
    examples, shapes = zip(*arguments, strict=True)
    fusions = {"RMSNormalization": 2 * shape.layers + 2 * len(cross) + 1, "RotaryEmbedding": 2 * len(own)}
    return Plan(Decoder(full), examples, shapes, spec, fusions)


def _zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.int64)


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {
        "model_type": "mllama_text_model",
        **SIZES[like],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "vocab_size": 128256,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
        "pad_token_id": SPECIALS["<pad>"],
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "mllama_vision_model",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": SPECIALS["<image>"],
        "text_config": text,
        "vision_config": vision,
    }


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 5, cross: tuple[int, ...] = (1, 3, 4)) -> MllamaConfig:
    """Config of a random checkpoint small enough for tests: head size 64, 4 tiles of 17 features per picture.

    As in the published models the image token lies behind the vocabulary, in the embedding's eight spare rows.
    """
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 3 * 128,
    }
    text = {
        "hidden_size": 64 * heads,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "cross_attention_layers": list(cross),
        "vocab_size": 259,
        "max_position_embeddings": 1024,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=259)


def write_tiny_processor(folder: Path, config: MllamaConfig) -> None:
    """Image-processor and processor settings that suit a config, and a chat template of the published kind."""
    vision: Any = config.vision_config
    settings = {
        "image_processor_type": "MllamaImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_pad": True,
        **tiny.CLIP_COLOURS,
        "resample": 2,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "max_image_tiles": vision.max_num_tiles,
    }
    tiny.write_settings(folder, settings, {"processor_class": "MllamaProcessor"})
    (folder / "chat_template.jinja").write_text(TINY_TEMPLATE)
