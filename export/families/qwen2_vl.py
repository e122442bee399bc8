"""Qwen2-VL as transformers defines it: every frame attends to itself as a whole, M-RoPE in time, row and column.

Its graphs, and what it shares with Qwen2.5-VL: :mod:`vlmtrim.export.tracing.qwen_vl`.
"""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vlmtrim.export.tracing import qwen_vl
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


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = True) -> Qwen2VLConfig:
    """Config of a random checkpoint small enough for tests."""
    return Qwen2VLConfig(
        **qwen_vl.tiny_settings("qwen2_vl_text", heads, kv_heads, layers, tied),
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 64 * heads, "num_heads": 2, "mlp_ratio": 2},
    )
