"""Checkpoints with the hub's names and shards: the generator, and parity with PyTorch at 1.4 B parameters."""

import json
import shutil

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vlmtrim.export import check_cli, pipeline
from vlmtrim.export.families import llava
from vlmtrim.export.job import Job
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL_VISION = {
    **llava.CLIP_LARGE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


def write(folder, tied, dtype, shard_bytes, layers=None, **fields):
    large.write_config(folder, large.config_of("llava-7b", str(dtype).removeprefix("torch."), layers, tied))
    large.write_weights(folder, dtype, shard_bytes, **fields)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(llava.SIZES, "llava-7b", SMALL)
    monkeypatch.setattr(llava, "CLIP_LARGE", SMALL_VISION)


@pytest.mark.parametrize("old_names", [True, False])
def test_transformers_loads_every_tensor(small, tied, old_names, tmp_path):
    folder = write(tmp_path / "c", tied, torch.float32, 2_000_000, old_names=old_names)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("language_model.model.embed_tokens.weight" in names) == old_names
    matrix = model.model.language_model.layers[0].mlp.up_proj.weight
    assert 1.2 < matrix.std() * matrix.shape[1] ** 0.5 < 1.8
    assert (model.model.language_model.norm.weight == 1).all()


def test_sharded_checkpoints_under_old_names_equal_pytorch(small, tied, tmp_path):
    folder = write(tmp_path / "c", tied, torch.float32, 2_000_000)
    job = Job(model=str(folder), output=str(tmp_path / "b"), method=FastV(k=1, r=0.5), max_seq_len=256)
    assert check_cli.main([str(pipeline.export(job, folder)), "--tokens", "8"]) == 0


@pytest.mark.slow
def test_parity_at_full_width(tied, tmp_path):
    """LLaVA-1.5-7B with 4 of its 32 layers: 1.4 billion parameters, float32, in shards."""
    folder = write(tmp_path / "c", tied, torch.float32, 2_000_000_000, layers=4)
    job = Job(model=str(folder), output=str(tmp_path / "b"), method=FastV(k=2, r=0.5), max_seq_len=2048)
    assert check_cli.main([str(pipeline.export(job, folder)), "--tokens", "8"]) == 0
    shutil.rmtree(tmp_path)
