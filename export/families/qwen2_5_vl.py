"""Qwen2.5-VL as transformers defines it: a tower of windowed and full attention, M-RoPE in time, row and column.

Its graphs, and what it shares with Qwen2-VL: :mod:`vlmtrim.export.tracing.qwen_vl`.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmtrim.export.tracing import qwen_vl
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
