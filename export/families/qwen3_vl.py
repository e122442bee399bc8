"""Qwen3-VL as transformers defines it: Qwen3 with interleaved M-RoPE, a tower with a grid of positions, DeepStack.

Features of some layers of the tower go through mergers of their own and are added to the visual tokens' states behind
the first decoder layers (DeepStack, Meng et al. 2024, arXiv 2406.04334). Graphs as in
:mod:`vlmtrim.export.tracing.qwen_vl`, with n such layers, and

    vision   grid_index   [M, G, 4]  corners of the learned grid that each patch lies between
             grid_weights [M, G, 4]  and how much each counts
             -> image_features [M, (1 + n) D]
    embed    ..., image_features [B, N, (1 + n) D] -> inputs_embeds [B, S, D], deepstack_features [B, S, n D]

Every two frames of a video are a picture to these graphs; the prompt has their times in words
(:mod:`vlmtrim.runtime.processors.qwen3_vl`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing import qwen_vl, text_decoder
from vlmtrim.export.tracing.attention import StaticCache
from vlmtrim.export.tracing.qwen_vl import SPECIALS as SPECIALS
from vlmtrim.export.tracing.qwen_vl import vision_dims as vision_dims
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.graphs.contract import TOKENS, Contract, GraphSpec, TensorSpec
from vlmtrim.runtime.processors.qwen3_vl import LEAST_OF_ALL, MOST_OF_ALL

MODEL_CLASS = Qwen3VLForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3-vl-32b": "Qwen/Qwen3-VL-32B-Instruct",
}
# Hidden, MLP, layers, heads, tied; of the text model and of the tower. As in the config.json of the presets.
SIZES = {
    "qwen3-vl-2b": ((2048, 6144, 28, 16, True), (1024, 4096, 24, (5, 11, 17))),
    "qwen3-vl-4b": ((2560, 9728, 36, 32, True), (1024, 4096, 24, (5, 11, 17))),
    "qwen3-vl-8b": ((4096, 12288, 36, 32, False), (1152, 4304, 27, (8, 16, 24))),
    "qwen3-vl-32b": ((5120, 25600, 64, 64, False), (1152, 4304, 27, (8, 16, 24))),
}
OLD_NAMES: tuple[tuple[str, str], ...] = ()


def read_shape(config: Qwen3VLConfig) -> qwen_vl.QwenShape:
    """Check the config against what this family exports, and read its numbers. Raises Refusal."""
    shape, vision = qwen_vl.read_shape(config), config.vision_config
    deepstack = len(vision.deepstack_visual_indexes)  # type: ignore[union-attr]
    if deepstack > shape.layers:
        raise Refusal(f"deepstack_visual_indexes has {deepstack} entries, the decoder {shape.layers} layers")
    return dataclasses.replace(shape, deepstack=deepstack)


class Vision(nn.Module):
    """Patches -> features of the merged tokens, and of those that DeepStack adds, side by side."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        frame_ids: Tensor,
        grid_index: Tensor,
        grid_weights: Tensor,
    ) -> Tensor:
        """Shapes as at the top of this module."""
        visual = self.full.model.visual
        proj = visual.patch_embed.proj
        hidden = F.linear(pixel_values.flatten(0, 1), proj.weight.flatten(1), proj.bias)
        corners = visual.pos_embed(grid_index.flatten(0, 1))
        hidden = hidden + (corners * grid_weights.flatten(0, 1)[:, :, None]).sum(1)
        tables = visual.rotary_pos_emb(hidden, patch_positions.flatten(0, 1))
        frame_of = frame_ids[:, None].expand(-1, pixel_values.shape[1]).flatten()
        same_frame = qwen_vl.additive(frame_of[:, None] == frame_of, hidden)[None, None]
        added = []
        for index, block in enumerate(visual.blocks):
            parts = qwen_vl.projected(block.attn, block.norm1(hidden), tables)
            attended = qwen_vl.attend_in_frames(block.attn, *parts, same_frame)
            hidden = hidden + block.attn.proj(attended)
            hidden = hidden + block.mlp(block.norm2(hidden))
            if index in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[list(visual.deepstack_visual_indexes).index(index)]
                added.append(merger(hidden))
        return torch.cat((visual.merger(hidden), *added), dim=1)


class Decoder(text_decoder.Decoder):
    """Transformers' layers one after the other; behind the first ones, what DeepStack adds."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        last_index: Tensor,
        deepstack_features: Tensor,
        write_indices: Tensor,
        key_positions: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """As :class:`text_decoder.Decoder` has it, with deepstack_features [B, S, n D]."""
        arguments = inputs_embeds, position_ids, last_index, write_indices, key_positions, past
        return self.run(*arguments, added=deepstack_features)

    def states(  # type: ignore[override]
        self, embeds: Tensor, position_ids: Tensor, mask: Tensor, cache: StaticCache, added: Tensor
    ) -> Tensor:
        """Normed states [B, S, D] behind the last layer."""
        text: Any = self.full.model.language_model
        tables, hidden = _rotary(text, position_ids, embeds.dtype), embeds
        parts = added.split(embeds.shape[2], dim=2)
        for index, layer in enumerate(text.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=tables, past_key_values=cache)
            if index < len(parts):
                hidden = hidden + parts[index]
        return text.norm(hidden)


def _rotary(text: Any, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, Dh]: columns take turns between time, row and column, as far as each axis has any."""
    rotary = text.rotary_emb
    axis = torch.zeros(len(rotary.inv_freq), dtype=torch.int64)
    for number, section in enumerate(rotary.mrope_section[1:], 1):
        axis[number : 3 * section : 3] = number
    turned = position_ids.float().index_select(0, axis).permute(1, 2, 0) * rotary.inv_freq
    angles = torch.cat((turned, turned), dim=-1)
    scale = rotary.attention_scaling
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def vision_spec(shape: qwen_vl.QwenShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    plain = qwen_vl.vision_spec(shape, dtype)
    corners = ("M", shape.group, 4)
    more = TensorSpec("grid_index", "int64", corners), TensorSpec("grid_weights", dtype, corners)
    width = (1 + shape.deepstack) * shape.hidden
    return GraphSpec(plain.file, (*plain.inputs, *more), (TensorSpec("image_features", dtype, ("M", width)),))


def plans(full: Any, shape: qwen_vl.QwenShape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    text = text_decoder.text_plans(full, shape, dtype, decoder, Decoder)
    return [qwen_vl.vision_plan(Vision(full), spec, dtype), *text]


def adapt_settings(folder: Path, contract: Contract) -> None:
    """As :func:`qwen_vl.adapt_settings`; a video's pixels, of all frames together, are two for each of a picture's."""
    qwen_vl.adapt_settings(folder, contract)
    for name, key in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        settings = content if key is None else content.get(key)
        if settings:
            pixels = 2 * contract.image_tokens * (settings.get("patch_size", 16) * settings.get("merge_size", 2)) ** 2
            size = {"shortest_edge": LEAST_OF_ALL, "longest_edge": MOST_OF_ALL, **(settings.get("size") or {})}
            settings["size"] = {edge: min(most, pixels) for edge, most in size.items()}
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    (hidden, mlp, layers, heads, tied), (width, inner, depth, levels) = SIZES[like]
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": list(levels),
    }
    return qwen_vl.published("qwen3_vl", text, vision)


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = False) -> Qwen3VLConfig:
    """Config of a random checkpoint small enough for tests: features of two tower layers are added behind two."""
    return Qwen3VLConfig(
        **qwen_vl.tiny_settings("qwen3_vl_text", heads, kv_heads, layers, tied),
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 64 * heads,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
    )


def write_tiny_processor(folder: Path, config: Any) -> None:
    """As :func:`qwen_vl.write_tiny_processor`, with settings for videos."""
    qwen_vl.write_tiny_processor(folder, config)
    settings = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4096, "longest_edge": 2 * qwen_vl.MOST_TOKENS * 32**2},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings, indent=2))
