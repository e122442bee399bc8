"""Idefics3 (Laurençon et al. 2024, arXiv 2408.12637) and the first SmolVLM: what SmolVLM2 is, under other names.

Graphs as in :mod:`vlmtrim.export.tracing.smol_vlm`; the text model is Llama 3, or SmolLM2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from vlmtrim.export.tracing import smol_vlm
from vlmtrim.export.tracing.smol_vlm import OLD_NAMES as OLD_NAMES
from vlmtrim.export.tracing.smol_vlm import plans as plans
from vlmtrim.export.tracing.smol_vlm import read_shape as read_shape
from vlmtrim.export.tracing.smol_vlm import vision_dims as vision_dims
from vlmtrim.export.tracing.smol_vlm import vision_spec as vision_spec
from vlmtrim.export.tracing.text_decoder import embed_spec as embed_spec
from vlmtrim.graphs.contract import TOKENS

MODEL_CLASS = Idefics3ForConditionalGeneration
PRUNES = TOKENS  # what methods remove of its pictures
PRESETS = {
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    "idefics3-8b": "HuggingFaceM4/Idefics3-8B-Llama3",
}
SIZES = {  # Llama 3 and SigLIP-SO400M; numbers in the order of SmolVLM's
    "idefics3-8b": ((4096, 14336, 32, 32, 8), (1152, 4304, 27, 16, 364, 14), 2),
}
SPECIALS = {"<s>": 128000, "</s>": 128001, "<pad>": 128002, "<image>": 128257}  # of the published tokenizer


def published(like: str) -> dict[str, Any]:
    """``config.json`` of one of SIZES, as the hub's is written."""
    text = {"vocab_size": 128259, "max_position_embeddings": 10240, "rope_theta": 5e5}
    return smol_vlm.published("idefics3", SIZES[like], SPECIALS, text)


def tiny_config(heads: int = 4, kv_heads: int = 2, layers: int = 4, tied: bool = False) -> Idefics3Config:
    """Config of a random checkpoint small enough for tests: tiles of 4 visual tokens, up to ten of them."""
    return Idefics3Config(**smol_vlm.tiny_settings(heads, kv_heads, layers, tied))


def write_tiny_processor(folder: Path, config: Any) -> None:
    """Tokenizer with the marks of tiles, chat template and processor settings that suit a config."""
    smol_vlm.write_tiny_processor(folder, config, "Idefics3")
