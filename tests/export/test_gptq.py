"""Calibrated packing: the formula against its definition, and layers that are packed while prompts run through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import assert_parity
from safetensors.torch import load_file, save_file

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import cli, pipeline
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.oracles.formats import unpacked
from vlmtrim.export.weights import tiny
from vlmtrim.export.weights.gptq import DAMPING, gptq
from vlmtrim.graphs.formats.int4 import SHRINK
from vlmtrim.graphs.formats.scales import symmetric
from vlmtrim.runtime.image import generated_picture

K, N, SEEN = 256, 12, 4096


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [K, N], and inputs [SEEN, K] that depend on each other, some of which are always zero."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K // 8, K, generator=random)
    seen = torch.randn(SEEN, K // 8, generator=random) @ mixing + 0.3 * torch.randn(SEEN, K, generator=random)
    seen[:, 5::50] = 0
    return torch.randn(K, N, generator=random), seen


def by_definition(matrix: np.ndarray, hessian: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ as its paper derives it: after each input the rest moves by the inverse Hessian of the inputs that are left;
    float64, nothing updated lazily, no Cholesky factor."""
    weights, damped = matrix.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    importance = hessian.diagonal().astype(np.float32)
    damped[np.diag_indices(K)] += np.where(damped.diagonal() == 0, 1.0, 0.0)
    damped[np.diag_indices(K)] += DAMPING * damped.diagonal().mean()
    codes, scales = np.empty((K, N), np.int8), []
    for row in range(K):
        if row % (block or K) == 0:
            part = weights[row : row + (block or K)].astype(np.float32)
            counts = np.maximum(importance[row : row + len(part)], 1e-12)
            scales.append(symmetric(part, 0, "float32", -8, 7, SHRINK, counts)[1])
        codes[row] = np.clip(np.rint(weights[row] / scales[-1]), -8, 7)
        error = weights[row] - codes[row] * scales[-1].astype(np.float64)
        inverse = np.linalg.inv(damped[row:, row:])
        weights[row:] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
    return codes, np.stack(scales)


@pytest.mark.parametrize("block", [32, 128, 0])
def test_integers_are_those_of_the_definition(block):
    """But for what lies on the edge between two integers in float32."""
    matrix, seen = problem()
    hessian = seen.T @ seen
    expected, scales = by_definition(matrix.numpy(), hessian.numpy(), block)
    left = matrix.clone()
    codes, found = gptq(left, hessian.clone(), block, "float32", -8, 7, SHRINK)
    assert np.mean(codes != expected) < 2e-3 and np.abs(codes.astype(int) - expected).max() <= 1
    assert np.allclose(found.reshape(scales.shape), scales, rtol=1e-3)
    assert torch.equal(left, torch.from_numpy(codes * np.repeat(found.reshape(scales.shape), block or K, axis=0)))


@pytest.mark.parametrize("block", [32, 128, 0])
def test_outputs_are_nearer_than_with_every_weight_rounded_alone(block):
    matrix, seen = problem(1)
    left = matrix.clone()
    gptq(left, seen.T @ seen, block, "float32", -8, 7, SHRINK)
    codes, scales = symmetric(matrix.numpy(), block, "float32", -8, 7, SHRINK, None)
    alone = torch.from_numpy(codes * np.repeat(scales.reshape(-1, N), block or K, axis=0))
    off = lambda packed: float((seen @ (packed - matrix)).square().mean())  # noqa: E731
    assert off(left) < 0.4 * off(alone)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(6):
        generated_picture(seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"What is number {seed}?")
    return folder


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_bundles_are_packed_on_pictures(family, pictures, tmp_path, capsys):
    """Parity with the oracle that unpacks them; each layer's outputs nearer than those of rounding alone."""
    source = tiny.write_checkpoint(checkpoints.load_family(family), tmp_path / "c")
    common = {"model": str(source), "max_seq_len": 512, "weights": "int4", "block": 32}
    traces: dict = {}
    plain = pipeline.export(Job(output=str(tmp_path / "plain"), **common), source, traces)
    packed = pipeline.export(Job(output=str(tmp_path / "packed"), calibrate=str(pictures), **common), source, traces)
    assert not list(packed.glob(".packed*"))
    assert_parity(packed, capsys, "--tokens", "4")
    errors = [
        last_states(folder, family, pictures) - last_states(source, family, pictures) for folder in (plain, packed)
    ]
    assert errors[1].square().mean() < 0.8 * errors[0].square().mean()


def last_states(folder, family, pictures) -> torch.Tensor:
    """States behind the last layer, of one of the pictures, on transformers' own model."""
    from vlmtrim.export.oracles.reference import own_processor

    with unpacked(folder) as checkpoint:
        model = checkpoints.load_family(family).MODEL_CLASS.from_pretrained(checkpoint, dtype=torch.float32).eval()
        processor = own_processor(folder)
    token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    inputs = processor(text=f"{token}\nWhat?", images=generated_picture(0), return_tensors="pt")
    with torch.no_grad():
        return model.model(**inputs, use_cache=False).last_hidden_state


def test_states_that_are_not_finite_are_refused_by_the_matrix(pictures, tmp_path):
    source = tiny.write_checkpoint(checkpoints.load_family("llava"), tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    tensors[name][0] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    job = Job(str(source), str(tmp_path / "b"), max_seq_len=512, weights="int8", calibrate=str(pictures))
    with pytest.raises(Refusal, match=r"layers.1.self_attn.q_proj.weight: weights or the states .* are not finite"):
        pipeline.export(job, source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "fp8"], "the method is fastv, the weights are fp8, the dtype is auto"),
        ([], "the method is fastv, the weights are float, the dtype is auto"),
    ],
)
def test_pictures_that_nothing_is_measured_on_are_refused(arguments, message, pictures, capsys):
    assert cli.main(["--model", "tiny:llava", "--calibrate", str(pictures), *arguments]) == 2
    assert message in capsys.readouterr().err
