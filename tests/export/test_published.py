"""Models of published sizes: planned from their configs alone, against numbers that were published with them."""

import pytest

from vlmtrim.export.checkpoint import family_names, prunes, published_sizes
from vlmtrim.export.job import Job
from vlmtrim.export.pipeline import prepare
from vlmtrim.export.weights import large
from vlmtrim.graphs import FastV
from vlmtrim.graphs.contract import TOKENS

# Billions of parameters, as the hub shows of each model's files in two or three digits; a tied matrix counts once.
PARAMETERS = {
    "llava-7b": 7.06,
    "llava-13b": 13.4,
    "llava-next-mistral-7b": 7.57,
    "llava-next-34b": 34.8,
    "llava-next-72b": 73,
    "llama-3.2-11b-vision": 10.7,
    "qwen2-vl-2b": 2.21,
    "qwen2-vl-7b": 8.29,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "internvl3-1b": 0.938,
    "internvl3-2b": 2.09,
    "internvl3-8b": 7.94,
    "internvl3-14b": 15.1,
    "internvl3-38b": 38.4,
    "internvl3-78b": 78.4,
    "internvl3.5-1b": 1.06,
    "internvl3.5-2b": 2.35,
    "internvl3.5-4b": 4.73,
    "internvl3.5-8b": 8.53,
    "internvl3.5-14b": 15.1,
    "internvl3.5-38b": 38.4,
}
LENGTH = 16384


@pytest.mark.parametrize("like", published_sizes())
def test_sizes_and_caches_follow_from_the_config(like, tmp_path):
    config = large.config_of(like)
    large.write_config(tmp_path, config)
    text = config["text_config"]
    if TOKENS not in prunes(published_sizes()[like]):
        prepared = prepare(Job(str(tmp_path), "", None, max_seq_len=LENGTH), tmp_path, None)
        assert prepared.plan.weights == 2 * sum(p.numel() for p in prepared.model.parameters())
        return
    length = min(LENGTH, text.get("max_position_embeddings", LENGTH))
    prepared = prepare(Job(str(tmp_path), "", FastV(k=2, r=0.75), max_seq_len=length), tmp_path, None)
    contract, visual = prepared.contract, prepared.contract.image_tokens
    layers, heads = text.get("num_hidden_layers", 32), text.get("num_attention_heads", 32)
    size = text.get("head_dim") or text.get("hidden_size", 4096) // heads
    entry = 2 * 2 * size * text.get("num_key_value_heads", heads)  # key and value of a token in a layer, float16
    later = length - visual + round(visual / 4)
    found = [(len(group.layers), group.nbytes(1, contract.dtype)) for group in contract.groups]
    assert found == [(2, 2 * length * entry), (layers - 2, (layers - 2) * later * entry)]
    assert prepared.plan.dense_caches == layers * length * entry


@pytest.mark.parametrize("like", PARAMETERS)
def test_parameters_are_those_of_the_published_model(like, tmp_path):
    if like not in published_sizes():
        pytest.skip("its family is not here")
    large.write_config(tmp_path, large.config_of(like))
    method = FastV() if TOKENS in prunes(published_sizes()[like]) else None
    prepared = prepare(Job(str(tmp_path), "", method, max_seq_len=4096), tmp_path, None)
    assert prepared.plan.weights / 2e9 == pytest.approx(PARAMETERS[like], rel=0.005)


def test_every_family_has_presets_and_published_sizes():
    assert set(published_sizes().values()) == set(family_names())
