"""Random checkpoints of published sizes, streamed to disk with real names, shapes, dtypes and shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.checkpoint import load_family, published_sizes, read_config
from vlmtrim.export.tracing.text_models import in_language_model
from vlmtrim.export.weights import make_header
from vlmtrim.export.weights.tiny import write_processor

_POOL = 2**24 + 43  # random values that tensors are cut from; a prime-like length, so that rows do not repeat


def config_of(like: str, dtype: str = "float16", layers: int | None = None, tied: bool = False) -> dict[str, Any]:
    """``config.json`` of a size that a family publishes (:func:`vlmtrim.export.checkpoint.published_sizes`).

    Args:
        layers: of the language model, where it is to have fewer.
        tied: one matrix for token embedding and output, where the published model has two.
    """
    config = load_family(published_sizes()[like]).published(like)
    text = dict(config["text_config"])
    if layers is not None:
        text["num_hidden_layers"] = layers
        for name in ("cross_attention_layers", "layer_types"):
            if name in text:  # numbers of layers, or an entry a layer
                text[name] = [x for x in text[name][:layers] if isinstance(x, str) or x < layers]
    if tied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = True
    return {**config, "torch_dtype": dtype, "text_config": text}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    family, full = read_config(folder)
    write_processor(family, folder, full, family.SPECIALS)


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
        for new, old in family.OLD_NAMES if old_names else ():
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
    gain = 1.5 if in_language_model(name) else 1.0
    scale = 0.02 if "embed" in name else gain * math.prod(shape[1:]) ** -0.5
    while left:
        piece = pool[start : start + left] * scale
        yield piece
        left -= len(piece)
        start = 0
