"""Qwen2.5-VL as transformers defines it: a tower of windowed and full attention, M-RoPE in time, row and column.

Its graphs, and what it shares with Qwen2-VL: :mod:`vlmtrim.export.tracing.qwen_vl`.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

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

MODEL_CLASS = Qwen2_5_VLForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {"qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
SIZES: dict[str, dict[str, Any]] = {  # Bai et al. 2025, arXiv 2502.13923, table 1
    "qwen2.5-vl-3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-vl-7b": {
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
    text = {**SIZES[like], "max_position_embeddings": 128000, **qwen_vl.PUBLISHED_ROPE}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return qwen_vl.published("qwen2_5_vl", text, vision)


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = False) -> Qwen2_5_VLConfig:
    """Config of a random checkpoint small enough for tests: windows of 2 x 2 tokens, the second block sees all."""
    return Qwen2_5_VLConfig(
        **qwen_vl.tiny_settings("qwen2_5_vl_text", heads, kv_heads, layers, tied),
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 2,
            "out_hidden_size": 64 * heads,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "tokens_per_second": 2,
        },
    )
