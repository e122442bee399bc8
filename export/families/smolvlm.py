"""SmolVLM2 as transformers defines it (Marafioti et al. 2025, arXiv 2504.05299): a small tower, SmolLM2 as decoder.

Its graphs, and what it shares with Idefics3: :mod:`vlmtrim.export.tracing.smol_vlm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from vlmtrim.export.tracing import smol_vlm
from vlmtrim.export.tracing.smol_vlm import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.smol_vlm import plans as plans
from vlmtrim.export.tracing.smol_vlm import read_shape as read_shape
from vlmtrim.export.tracing.smol_vlm import vision_dims as vision_dims
from vlmtrim.export.tracing.smol_vlm import vision_spec as vision_spec
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.graphs.contract import TOKENS

MODEL_CLASS = SmolVLMForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
# Hidden, MLP, layers, heads, key and value heads of the text model; those, image and patch of the tower; scale factor.
SIZES = {
    "smolvlm2-256m": ((576, 1536, 30, 9, 3), (768, 3072, 12, 12, 512, 16), 4),
    "smolvlm2-500m": ((960, 2560, 32, 15, 5), (768, 3072, 12, 12, 512, 16), 4),
    "smolvlm2-2.2b": ((2048, 8192, 24, 32, 32), (1152, 4304, 27, 16, 384, 14), 3),
}
SPECIALS = {"<s>": 1, "</s>": 49279, "<pad>": 2, "<image>": 49190}  # as in the published tokenizers, by their use


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {
        "vocab_size": 49280,
        "max_position_embeddings": 8192,
        "rope_theta": 130000.0 if like.endswith("2.2b") else 100000.0,
    }
    return smol_vlm.published("smolvlm", SIZES[like], SPECIALS, text)


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = False) -> SmolVLMConfig:
    """Config of a random checkpoint small enough for tests: tiles of 4 visual tokens, up to ten of them."""
    return SmolVLMConfig(**smol_vlm.tiny_settings(heads, kv_heads, layers, tied))


def write_tiny_processor(folder: Path, config: Any) -> None:
    """Tokenizer with the marks of tiles, chat template and processor settings that suit a config."""
    smol_vlm.write_tiny_processor(folder, config, "SmolVLM")
