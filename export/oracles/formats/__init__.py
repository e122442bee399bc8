"""Packed matrices read a second time, in PyTorch: one module a format, ``restore(stored, name)`` -> float32 [N, K].

Nothing here shares code with :mod:`vlmtrim.graphs.formats`.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMATS = ("int4", "int4_sum", "int4_zero", "int8", "fp8", "nvfp4", "w8a8")


@contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """The folder itself where it is a checkpoint as transformers writes it; where matrices are packed, a temporary one
    with their float32 values."""
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            packed = any(name.rpartition(".")[2] in FORMATS for name in tensors.keys())  # noqa: SIM118
            if not packed:
                continue
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    if not stored:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch)
        for path in (*folder.glob("*.json"), *folder.glob("*.jinja")):
            shutil.copyfile(path, plain / path.name)
        floats = _plain(stored)
        if "lm_head.weight" in floats:
            _untie(plain / "config.json")
        save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
        yield plain


def _plain(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {}
    for name, tensor in stored.items():
        parameter, _, suffix = name.rpartition(".")
        if suffix in FORMATS:
            module = importlib.import_module(f"{__name__}.{suffix}")
            plain[parameter] = module.restore(stored, parameter).contiguous()
        elif suffix.partition("_")[0] not in FORMATS:
            plain[name] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    return plain


def _untie(config: Path) -> None:
    """A head that is packed is no longer the embedding."""
    raw = json.loads(config.read_text())
    for part in (raw, raw.get("text_config", {})):
        part["tie_word_embeddings"] = False
    config.write_text(json.dumps(raw))


def spread(scales: Tensor, inputs: int) -> Tensor:
    """Scales [K / block, N] or [N] -> [N, K], one for every weight."""
    per_block = scales.to(torch.float32)
    if per_block.ndim == 1:
        return per_block[:, None].expand(-1, inputs)
    return per_block.t().repeat_interleave(inputs // per_block.shape[0], dim=1)


def codes(packed: Tensor, outputs: int) -> Tensor:
    """Bytes [K * N / 2] of two codes each, the first low -> uint8 codes [N, K], of what lies as [K, N]."""
    return torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1, outputs).t()
