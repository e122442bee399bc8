"""Random checkpoints of published sizes, streamed to disk with real names, shapes, dtypes and shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.checkpoint import read_config
from vlmtrim.export.weights import make_header
from vlmtrim.export.weights.tiny import write_processor

# Language models of LLaVA-1.5 (Liu et al. 2023): Vicuna v1.5 with 64 rows more in the embedding; tower CLIP-L/14-336.
# Llama-3.2-Vision (Llama Team 2024, arXiv 2407.21783, section 7): Llama 3.1 with a cross-attention layer every fifth.
TEXT: dict[str, dict[str, Any]] = {
    "llava-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llava-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-3.2-11b-vision": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    },
}
LLAVA = tuple(name for name, text in TEXT.items() if "cross_attention_layers" not in text)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
TILED_VISION = {
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
SPECIALS = {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
LLAMA_SPECIALS = {"<s>": 128000, "</s>": 128001, "<pad>": 128004, "<image>": 128256}  # the last behind the vocabulary
# The hub's files have the names that transformers used when the models came out.
OLD_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_POOL = 2**24 + 43  # random values that tensors are cut from; a prime-like length, so that rows do not repeat


def config_of(like: str, dtype: str = "float16", layers: int | None = None, tied: bool = False) -> dict[str, Any]:
    """``config.json`` of a size in TEXT, as the hub's is written; ``layers`` shortens the language model."""
    if "cross_attention_layers" in TEXT[like]:
        return _tiled_config(like, dtype, layers, tied)
    text = {
        "model_type": "llama",
        **TEXT[like],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32064,
        "bos_token_id": SPECIALS["<s>"],
        "eos_token_id": SPECIALS["</s>"],
    }
    text["num_key_value_heads"] = text["num_attention_heads"]
    if layers is not None:
        text["num_hidden_layers"] = layers
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": dtype,
        "image_token_index": SPECIALS["<image>"],
        "pad_token_id": SPECIALS["<pad>"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": VISION,
    }


def _tiled_config(like: str, dtype: str, layers: int | None, tied: bool) -> dict[str, Any]:
    text = {
        "model_type": "mllama_text_model",
        **TEXT[like],
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
        "bos_token_id": LLAMA_SPECIALS["<s>"],
        "eos_token_id": LLAMA_SPECIALS["</s>"],
        "pad_token_id": LLAMA_SPECIALS["<pad>"],
        "tie_word_embeddings": tied,
    }
    if layers is not None:
        text["num_hidden_layers"] = layers
        text["cross_attention_layers"] = [layer for layer in text["cross_attention_layers"] if layer < layers]
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "torch_dtype": dtype,
        "image_token_index": LLAMA_SPECIALS["<image>"],
        "text_config": text,
        "vision_config": TILED_VISION,
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    family, full = read_config(folder)
    write_processor(family, folder, full, LLAMA_SPECIALS if config["model_type"] == "mllama" else SPECIALS)


def write_weights(
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    seed: int = 0,
    old_names: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Random weights for the config in ``folder``, at most one shard's header and one piece of a tensor in memory.

    Matrices have the standard deviation 1.5 / sqrt(inputs) in the language model, so that attention is not uniform and
    activations stay bounded; norms are 1 and biases 0.
    """
    shards = _shards(_parameters(folder, old_names), dtype, shard_bytes)
    total = sum(math.prod(shape) * dtype.itemsize for shard in shards for _, shape in shard)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    done, start = 0, 0
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(make_header({name: (dtype, shape) for name, shape in shard}))
            for name, shape in shard:
                for piece in _values(name, shape, pool, start):
                    stream.write(piece.to(dtype).view(torch.uint8).numpy().data)
                    done += len(piece) * dtype.itemsize
                    progress(done, total)
                start = (start + 7919 * 104729) % _POOL
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _parameters(folder: Path, old_names: bool) -> list[tuple[str, tuple[int, ...]]]:
    family, config = read_config(folder)
    with torch.device("meta"):
        model = family.MODEL_CLASS(config)
    found = []
    for name, parameter in model.named_parameters():  # a tied weight is named once
        for new, old in OLD_NAMES if old_names else ():
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        found.append((name, tuple(parameter.shape)))
    return found


def _shards(parameters: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype, limit: int) -> list[list]:
    shards: list[list] = [[]]
    size = 0
    for name, shape in parameters:
        length = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + length > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += length
    return shards


def _values(name: str, shape: tuple[int, ...], pool: Tensor, start: int) -> Iterator[Tensor]:
    """A tensor's values, flat float32 pieces."""
    left = math.prod(shape)
    if len(shape) < 2 and "class_embedding" not in name:
        yield torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        return
    gain = 1.5 if "language_model" in name else 1.0
    scale = 0.02 if "embed" in name else gain * math.prod(shape[1:]) ** -0.5
    while left:
        piece = pool[start : start + left] * scale
        yield piece
        left -= len(piece)
        start = 0
