"""Qwen2-VL as transformers defines it: every frame attends to itself as a whole, M-RoPE in time, row and column.

Its graphs, and what it shares with Qwen2.5-VL: :mod:`vlmtrim.export.tracing.qwen_vl`.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vlmtrim.export.tracing import qwen_vl
from vlmtrim.export.tracing.qwen_vl import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.qwen_vl import SPECIALS as SPECIALS
from vlmtrim.export.tracing.qwen_vl import adapt_settings as adapt_settings
from vlmtrim.export.tracing.qwen_vl import plans as plans
from vlmtrim.export.tracing.qwen_vl import read_shape as read_shape
from vlmtrim.export.tracing.qwen_vl import vision_dims as vision_dims
from vlmtrim.export.tracing.qwen_vl import vision_spec as vision_spec
from vlmtrim.export.tracing.qwen_vl import write_tiny_processor as write_tiny_processor
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.graphs.contract import TOKENS

MODEL_CLASS = Qwen2VLForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {"qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct"}
SIZES: dict[str, dict[str, Any]] = {  # Wang et al. 2024, arXiv 2409.12191: Qwen2 and a tower of 675 M parameters
    "qwen2-vl-2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2-vl-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {**SIZES[like], "max_position_embeddings": 32768, **qwen_vl.PUBLISHED_ROPE}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
    return qwen_vl.published("qwen2_vl", text, vision)


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = True) -> Qwen2VLConfig:
    """Config of a random checkpoint small enough for tests."""
    return Qwen2VLConfig(
        **qwen_vl.tiny_settings("qwen2_vl_text", heads, kv_heads, layers, tied),
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 64 * heads, "num_heads": 2, "mlp_ratio": 2},
    )
