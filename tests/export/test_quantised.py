"""Checkpoints that come quantised: what the oracle reads of the bundle is what the method's definition says, exactly.

Checkpoints are made of random words, so that every pattern of bits occurs; weights are computed here, from each
method's definition, one weight at a time by index, sharing no code with what repacks them.
"""

from __future__ import annotations

import json

import pytest
import torch
from parity import assert_parity
from safetensors.torch import load_file, save_file

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import pipeline
from vlmtrim.export.job import Job
from vlmtrim.export.oracles.formats import unpacked
from vlmtrim.export.weights import read_checkpoint, read_header, tiny
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods import make_method

LAYERS = 7 * 4  # matrices of the tiny decoder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint in floats whose layers have biases."""
    return tiny.write_checkpoint(checkpoints.load_family("qwen2_vl"), tmp_path_factory.mktemp("plain") / "c")


@pytest.fixture(scope="module")
def traces():
    return {}


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def scales(inputs: int, *shape: int, bits: int = 4) -> torch.Tensor:
    """That keep activations of the decoder near 1."""
    return (torch.rand(shape) + 0.5).mul(5 / 2**bits * inputs**-0.5).to(torch.float16)


def field(word: torch.Tensor, place: torch.Tensor, bits: int) -> torch.Tensor:
    """Bits of words, the ``place``-th lowest group of them."""
    return (word.long() >> (place * bits)) & ((1 << bits) - 1)


class Gptq:
    def __init__(self, bits=4, group=64, sym=True, form="gptq", order=None):
        self.settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
        self.settings["checkpoint_format"] = form
        self.bits, self.group, self.sym, self.less, self.order = bits, group, sym, form == "gptq", order

    def make(self, inputs, outputs):
        group = inputs if self.group == -1 else self.group
        count, per = inputs // group, 32 // self.bits
        middle = (1 << (self.bits - 1)) - self.less
        zeros = words(count, outputs // per)
        if self.sym:
            zeros = torch.full_like(zeros, sum(middle << (self.bits * i) for i in range(per)) & 0x7FFFFFFF)
            zeros = zeros | (-(2**31) if middle >> (self.bits - 1) else 0)
        groups = torch.arange(inputs) // group
        groups = groups if self.order is None else self.order(groups)
        return {
            "qweight": words(inputs // per, outputs),
            "qzeros": zeros,
            "scales": scales(inputs, count, outputs, bits=self.bits),
            "g_idx": groups.to(torch.int32),
        }

    def weights(self, parts, outputs, inputs):
        per, k, n = 32 // self.bits, torch.arange(inputs), torch.arange(outputs)
        codes = field(parts["qweight"][k // per], (k % per)[:, None], self.bits)
        zeros = field(parts["qzeros"][:, n // per], n % per, self.bits) + int(self.less)
        group = parts["g_idx"].long()
        return ((codes - zeros[group] % 2**self.bits) * parts["scales"].float()[group]).t()


def write(method, plain, folder):
    """A quantised twin of a checkpoint; returns its packed matrices: name -> float32 [N, K]."""
    torch.manual_seed(0)
    floats, stored, expected = load_file(plain / "model.safetensors"), {}, {}
    config = json.loads((plain / "config.json").read_text())
    for name, tensor in floats.items():
        if tensor.ndim == 2 and ".layers." in name and name.endswith("proj.weight"):
            outputs, inputs = tensor.shape
            parts = method.make(inputs, outputs)
            expected[name.replace("model.layers", "model.language_model.layers")] = method.weights(
                parts, outputs, inputs
            )
            stored |= {f"{name.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = tensor.half()
    folder.mkdir()
    for path in (*plain.glob("*.json"), *plain.glob("*.jinja")):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method.settings}))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


def job(source, target, **fields):
    return Job(str(source), str(target), max_seq_len=512, method=make_method("fastv", k=1, r=0.5), **fields)


def check_bundle(folder, expected, kinds):
    """Weights as the definition says, parts of the contract, and no word of the method left."""
    contract = open_bundle(folder).contract
    assert {(kind.part, kind.format, kind.block): kind.matrices for kind in contract.packed} == kinds
    with unpacked(folder) as source:
        read = load_file(source / "model.safetensors")
    assert len(expected) == LAYERS
    for name, weights in expected.items():
        assert torch.equal(read[name], weights), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


CASES = {
    "gptq": (Gptq(), "int4", 64),
    "gptq-v2-column": (Gptq(group=-1, form="gptq_v2"), "int4", 0),
    "gptq-8": (Gptq(bits=8, group=32), "int8", 32),
    "gptq-zeros": (Gptq(group=32, sym=False), "int4_zero", 32),
    "gptq-groups-turned": (Gptq(group=32, order=lambda groups: groups.flip(0)), "int4", 32),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_definition(case, plain, traces, tmp_path, capsys):
    method, name, block = CASES[case]
    expected = write(method, plain, tmp_path / "c")
    folder = pipeline.export(job(tmp_path / "c", tmp_path / "b", dtype="float32"), tmp_path / "c", traces)
    check_bundle(folder, expected, {("layers", name, block): LAYERS})
    assert json.loads((folder / "job.json").read_text())["quantised"] == method.settings["quant_method"]
    tensors = read_checkpoint(tmp_path / "c")
    by_config, foreseen = (
        pipeline.prepare(job(tmp_path / "c", tmp_path / "d", dtype="float32"), tmp_path / "c", known)
        for known in (None, tensors)
    )
    packed = open_bundle(folder).contract.packed
    assert by_config.contract.packed == foreseen.contract.packed == packed
    written = sum(tensor.length for tensor in read_header(folder / "model.safetensors").values())
    assert foreseen.plan.weights == written
    assert_parity(folder, capsys, "--tokens", "4")
