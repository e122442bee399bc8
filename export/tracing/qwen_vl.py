"""What Qwen2-VL, Qwen2.5-VL and in part Qwen3-VL share: pictures of any size, patches rotated in two axes, M-RoPE.

Graphs (M visual tokens of all pictures, G patches merged into one token, V windows of L tokens; the other dims as in
:mod:`vlmtrim.graphs.contract`)

    vision   pixel_values    [M, G, C T p p]  patches, the G that become one token together
             patch_positions [M, G, 2]        row and column of each patch in its picture
             frame_ids       [M]              number of the frame (a still picture is one) that a token belongs to
             window_tokens   [V, L]           tokens of each attention window, filled up with -1     (Qwen2.5-VL)
             window_slots    [M]              where in window_tokens, read as one row, each token is (Qwen2.5-VL)
             -> image_features [M, D]
    embed, decoder: as for the other families, position_ids [3, B, S]

transformers computes the same numbers from the pictures' grids while it runs, which no graph can hold; here the host
does (:mod:`vlmtrim.runtime.processors.qwen2_5_vl`). Frames attend to themselves alone: one attention under a
block-diagonal mask. Windows of equal capacity are a batch, so that windowed layers cost what their windows cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.attention import onnx_attention
from vlmtrim.export.tracing.text_decoder import Shape, text_numbers, text_plans
from vlmtrim.export.tracing.text_models import tiny_text
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.contract import Contract, GraphSpec, TensorSpec

# Visual tokens of a picture of 12,845,056 pixels, the limit that the published checkpoints set.
MOST_TOKENS = 16384
# The least tokens of a picture in transformers' default settings (56 x 56 pixels); a strip of five takes two windows.
_LEAST_TOKENS_PER_WINDOW = 2.5
SPECIALS = {"<s>": 151644, "</s>": 151645, "<pad>": 151643}  # of the published tokenizer, whose names differ
VISION_TOKENS = {  # name -> (field of configs, id in tiny ones, id in published ones)
    "<|vision_start|>": ("vision_start_token_id", 260, 151652),
    "<|image_pad|>": ("image_token_id", 261, 151655),
    "<|video_pad|>": ("video_token_id", 262, 151656),
    "<|vision_end|>": ("vision_end_token_id", 263, 151653),
}
PUBLISHED_ROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
OLD_NAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))  # of transformers of their day
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class QwenShape(Shape):
    """The numbers of a Qwen checkpoint; ``window`` is the side of an attention window in tokens, 0 for none."""

    group: int = 4
    patch_values: int = 1176
    window: int = 0


def read_shape(config: Any) -> QwenShape:
    """Check the config against what is exported, and read its numbers. Raises Refusal."""
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    window = getattr(vision, "window_size", 0) // merge // vision.patch_size
    if hasattr(vision, "window_size") and window < 1:
        raise Refusal(f"window_size {vision.window_size} is less than a token of {merge * vision.patch_size} pixels")
    if config.vision_config.temporal_patch_size != 2:
        raise Refusal(f"temporal_patch_size is {vision.temporal_patch_size}; the family exports 2")
    return QwenShape(
        **text_numbers(config, (f"{config.model_type}_text",)),
        image_size=0,
        image_tokens=MOST_TOKENS,
        any_size=True,
        image_grid=None,
        video_token_id=config.video_token_id,
        position_axes=3,
        group=merge**2,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        window=window,
    )


class Vision(nn.Module):
    """Patches -> features of the merged tokens, with transformers' own modules but for what it splits by lengths."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        frame_ids: Tensor,
        window_tokens: Tensor | None = None,
        window_slots: Tensor | None = None,
    ) -> Tensor:
        """Shapes as at the top of this module; attention inside windows where they are given."""
        visual = self.full.model.visual
        group = pixel_values.shape[1]
        # A convolution whose kernel covers its whole input is a matrix product.
        hidden = F.linear(pixel_values.flatten(0, 1), visual.patch_embed.proj.weight.flatten(1))
        tables = visual.rotary_pos_emb(hidden, patch_positions.flatten(0, 1))
        frame_of = frame_ids[:, None].expand(-1, group).flatten()
        same_frame = additive(frame_of[:, None] == frame_of, hidden)[None, None]
        windows = None
        if window_tokens is not None and window_slots is not None:
            filled = (window_tokens >= 0)[:, :, None].expand(-1, -1, group).flatten(1)
            mask = additive(filled, hidden)[:, None, None].expand(-1, 1, filled.shape[1], -1)
            windows = (window_tokens.clamp(min=0).flatten(), mask, window_slots)
        for index, block in enumerate(visual.blocks):
            query, key, value = projected(block.attn, block.norm1(hidden), tables)
            if windows is None or index in visual.fullatt_block_indexes:
                attended = attend_in_frames(block.attn, query, key, value, same_frame)
            else:
                attended = _attend_in_windows(block.attn, torch.stack((query, key, value), 1), group, *windows)
            hidden = hidden + block.attn.proj(attended)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return visual.merger(hidden)


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """Mask that is added to scores, of the dtype of ``like``: 0 where visible."""
    return torch.where(visible, 0.0, torch.finfo(like.dtype).min).to(like.dtype)


def projected(attention: Any, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the patches [P, H, Dh], rotated."""
    query, key, value = attention.qkv(hidden).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    return *apply_rotary_pos_emb_vision(query, key, *tables), value


def attend_in_frames(attention: Any, query: Tensor, key: Tensor, value: Tensor, same_frame: Tensor) -> Tensor:
    """Attention [P, H Dh] of all patches [P, H, Dh] under a mask additive [1, 1, P, P]."""
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return onnx_attention(attention, query, key, value, same_frame, attention.scaling)[0][0].flatten(1)


def _attend_in_windows(
    attention: Any, parts: Tensor, group: int, tokens: Tensor, mask: Tensor, slots: Tensor
) -> Tensor:
    """Attention [P, H Dh] of parts [P, 3, H, Dh]: ``tokens`` [V L] gathers them into windows, ``slots`` [M] back."""
    _, three, heads, size = parts.shape
    windows = mask.shape[0]
    gathered = parts.reshape(-1, group * three * heads * size).index_select(0, tokens)
    query, key, value = gathered.reshape(windows, -1, three, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    attended = onnx_attention(attention, query, key, value, mask, attention.scaling)[0]
    back = attended.reshape(-1, group * heads * size).index_select(0, slots)
    return back.reshape(-1, heads * size)


def vision_spec(shape: QwenShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    inputs = [
        TensorSpec("pixel_values", dtype, ("M", shape.group, shape.patch_values)),
        TensorSpec("patch_positions", "int64", ("M", shape.group, 2)),
        TensorSpec("frame_ids", "int64", ("M",)),
    ]
    if shape.window:
        inputs.append(TensorSpec("window_tokens", "int64", ("V", shape.window**2)))
        inputs.append(TensorSpec("window_slots", "int64", ("M",)))
    return GraphSpec("vision.onnx", tuple(inputs), (TensorSpec("image_features", dtype, ("M", shape.hidden)),))


def vision_dims(shape: QwenShape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures."""
    tokens = images * shape.image_tokens
    dims = {"M": (1, tokens)}
    if shape.window:
        dims["V"] = (1, max(1, int(tokens / _LEAST_TOKENS_PER_WINDOW)))
    return dims


def plans(full: Any, shape: QwenShape, dtype: torch.dtype, decoder: GraphSpec) -> list[Plan]:
    """What to trace. ``decoder`` is the boundary before any selection."""
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    norms = 2 * len(full.model.visual.blocks) + 1 if shape.window else 0  # Qwen2-VL's are layer norms
    return [vision_plan(Vision(full), spec, dtype, norms), *text_plans(full, shape, dtype, decoder)]


def vision_plan(module: nn.Module, spec: GraphSpec, dtype: torch.dtype, norms: int = 0) -> Plan:
    """How to trace ``vision.onnx`` of a tower that holds so many RMS norms."""
    tokens, windows = 6, 3
    sizes = {"M": tokens, "V": windows}
    dims = {"M": Dim("M", max=2**20), "V": Dim("V", max=2**20)}
    args = [
        torch.zeros(
            [dim if isinstance(dim, int) else sizes[dim] for dim in tensor.shape],
            dtype=torch.int64 if tensor.dtype == "int64" else dtype,
        )
        for tensor in spec.inputs
    ]
    shapes = tuple({0: dims[str(tensor.shape[0])]} for tensor in spec.inputs)
    return Plan(module, args, shapes, spec, fusions={"RMSNormalization": norms})


def adapt_settings(folder: Path, contract: Contract) -> None:
    """Lower the picture size in a bundle's image-processor settings to what the contract allows a picture.

    Whoever reads the settings, transformers included, then prepares pictures that the bundle takes.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            continue
        content = json.loads((folder / name).read_text())
        settings = content.get("image_processor") if name == "processor_config.json" else content
        if not settings:
            continue
        _lower(settings, contract.image_tokens)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _lower(settings: dict[str, Any], tokens: int) -> None:
    pixels = tokens * (settings.get("patch_size", 14) * settings.get("merge_size", 2)) ** 2
    size = dict(settings.get("size") or {})
    least = settings.pop("min_pixels", None) or size.get("shortest_edge") or size.get("min_pixels") or 56 * 56
    most = settings.pop("max_pixels", None) or size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280
    settings["size"] = {"shortest_edge": min(least, pixels), "longest_edge": min(most, pixels)}


def tiny_settings(text: str, heads: int, kv_heads: int, layers: int, tied: bool) -> dict[str, Any]:
    """Settings, all but the tower's, of a random checkpoint small enough for tests: head size 64."""
    return {
        "text_config": tiny_text(text, heads, kv_heads, layers),
        "tie_word_embeddings": tied,
        **{field: token for field, token, _ in VISION_TOKENS.values()},
    }


def published(name: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a ``model_type`` with the numbers of one size, as the hub's is written."""
    own = {
        "model_type": f"{name}_text",
        **text,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
        "pad_token_id": SPECIALS["<pad>"],
        "rms_norm_eps": 1e-06,
    }
    return {
        "model_type": name,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": own,
        "vision_config": vision,
        **{field: token for field, _, token in VISION_TOKENS.values()},
    }


def write_tiny_processor(folder: Path, config: Any) -> None:
    """Tokenizer with the vision tokens, chat template and processor settings that suit a config."""
    text = config.text_config
    marks = {"<s>": text.bos_token_id, "</s>": text.eos_token_id, "<pad>": text.pad_token_id}
    marks |= {name: getattr(config, field) for name, (field, _, _) in VISION_TOKENS.items()}
    tiny.write_tokenizer(folder, marks, image_token="<|image_pad|>")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    processor: Any = PROCESSOR_MAPPING[type(config)]
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor.__name__,
        "size": {"shortest_edge": 4 * side**2, "longest_edge": MOST_TOKENS * side**2},
        "patch_size": config.vision_config.patch_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
