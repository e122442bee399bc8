"""Checkpoints that come quantised: what the oracle reads of the bundle is what the method's definition says, exactly.

Checkpoints are made of random words, so that every pattern of bits occurs; weights are computed here, from each
method's definition, one weight at a time by index, sharing no code with what repacks them.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from parity import assert_parity
from safetensors.torch import load_file, save_file

from vlmtrim.export import check_cli, pipeline
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.oracles import formats
from vlmtrim.export.oracles.formats import unpacked
from vlmtrim.export.weights import Wanted, match_parameters, read_checkpoint, read_header, store, tiny
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods import make_method
from vlmtrim.runtime.engines import rebuild
from vlmtrim.runtime.errors import RuntimeRefusal

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


class Awq:
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # nibble that holds a word's n-th column

    def __init__(self, group=32, zeros=True):
        self.settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zeros, "version": "gemm"}
        self.group, self.zeros = group, zeros

    def make(self, inputs, outputs):
        count = inputs // self.group
        zeros = words(count, outputs // 8)
        return {
            "qweight": words(inputs, outputs // 8),
            "qzeros": zeros if self.zeros else torch.full_like(zeros, -0x77777778),
            "scales": scales(inputs, count, outputs),
        }

    def weights(self, parts, outputs, inputs):
        k, n = torch.arange(inputs) // self.group, torch.arange(outputs)
        codes, zeros = (field(parts[part][:, n // 8], self.order[n % 8], 4) for part in ("qweight", "qzeros"))
        return ((codes - zeros[k]) * parts["scales"].float()[k]).t()


class Compressed:
    """pack-quantized or int-quantized integers."""

    def __init__(self, bits, group, packed=True, sym=True):
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        weights = {"num_bits": bits, "type": "int", "symmetric": sym, **strategy}
        self.settings = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if packed else "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:visual.*"],
        }
        self.bits, self.group, self.packed, self.sym = bits, group, packed, sym

    def make(self, inputs, outputs):
        count = inputs // self.group if self.group else 1
        scale = {"weight_scale": scales(inputs, outputs, count, bits=self.bits)}
        if not self.packed:
            return {"weight": torch.randint(-128, 128, (outputs, inputs)).to(torch.int8), **scale}
        shape = {"weight_shape": torch.tensor([outputs, inputs])}
        zeros = {} if self.sym else {"weight_zero_point": words(outputs * self.bits // 32, count)}
        return {"weight_packed": words(outputs, inputs * self.bits // 32), **scale, **shape, **zeros}

    def weights(self, parts, outputs, inputs):
        k, n, per = torch.arange(inputs), torch.arange(outputs), 32 // self.bits
        group = k // (self.group or inputs)
        scale = parts["weight_scale"].float()[:, group]
        if not self.packed:
            return parts["weight"].float() * scale
        codes, zeros = field(parts["weight_packed"][:, k // per], k % per, self.bits), 1 << (self.bits - 1)
        if not self.sym:
            zeros = field(parts["weight_zero_point"][n // per], (n % per)[:, None], self.bits)[:, group]
        return (codes - zeros) * scale


class Floats:
    """Floats of 8 bits: of compressed-tensors or of the hub's fp8, by the shape of scales."""

    def __init__(self, strategy, method="fp8"):
        self.strategy, self.method = strategy, method
        block = {"weight_block_size": [128, 128]} if strategy == "block" else {}
        self.settings = {"quant_method": method, "activation_scheme": "dynamic", **block}
        if method == "compressed-tensors":
            weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}}
            self.settings |= {"format": "float-quantized", "config_groups": groups}
        self.settings["ignore" if method != "fp8" else "modules_to_not_convert"] = ["lm_head", "visual"]

    def make(self, inputs, outputs):
        shape = {"tensor": (1,), "channel": (outputs, 1), "block": (-(-outputs // 128), -(-inputs // 128))}
        name = "weight_scale" if self.method != "fp8" else "weight_scale_inv"
        floats = (torch.randn(outputs, inputs) * 64).to(torch.float8_e4m3fn)
        return {"weight": floats, name: scales(inputs, *shape[self.strategy], bits=8), "input_scale": torch.ones(1)}

    def weights(self, parts, outputs, inputs):
        scale = next(part for name, part in parts.items() if "weight_scale" in name).float().reshape(-1, 1)
        if self.strategy == "block":
            n, k = torch.arange(outputs) // 128, torch.arange(inputs) // 128
            scale = parts["weight_scale_inv"].float()[n][:, k]
        return parts["weight"].float() * scale


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
    (folder / "config.json").write_text(
        json.dumps({**config, "dtype": "float16", "quantization_config": method.settings})
    )
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
    "awq": (Awq(), "int4_zero", 32),
    "awq-symmetric": (Awq(group=64, zeros=False), "int4", 64),
    "compressed-4": (Compressed(4, 64), "int4", 64),
    "compressed-4-zeros": (Compressed(4, 32, sym=False), "int4_zero", 32),
    "compressed-8-words": (Compressed(8, 0), "int8", 0),
    "compressed-8": (Compressed(8, 0, packed=False), "int8", 0),
    "gptq-groups-turned": (Gptq(group=32, order=lambda groups: groups.flip(0)), "int4", 32),
}


PARITY = ("gptq", "gptq-v2-column", "awq", "compressed-8")  # one of every form


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
    if case in PARITY:
        assert_parity(folder, capsys, "--tokens", "4")


def test_zero_points_are_subtracted_as_sums_where_engines_are_built(plain, traces, tmp_path, capsys):
    """TensorRT reads none; the same bundle still runs on ONNX Runtime."""
    method = Awq()
    expected = write(method, plain, tmp_path / "c")
    fields = {"dtype": "float32", "engine": "tensorrt-rtx"}
    folder = pipeline.export(job(tmp_path / "c", tmp_path / "b", **fields), tmp_path / "c", traces)
    check_bundle(folder, expected, {("layers", "int4_sum", method.group): LAYERS})
    prints = json.loads((folder / "engines.json").read_text())
    assert set(prints) == {"vision.engine", "embed.engine", "decoder.engine"}
    assert_parity(folder, capsys, "--tokens", "4")


@pytest.mark.parametrize(("method", "shards"), [(make_method("fastv", k=3, r=0.5), 1), (make_method("pyramid"), 0)])
def test_sums_go_with_a_selection_in_the_last_piece_and_with_stages(method, shards, plain, traces, tmp_path):
    """A selection directly before the last layer, and stages, which are cut into two engines of themselves."""
    write(Awq(), plain, tmp_path / "c")
    asked = Job(
        str(tmp_path / "c"), str(tmp_path / "b"), method, "float16", 512, engine="tensorrt-rtx", engine_shards=shards
    )
    folder = pipeline.export(asked, tmp_path / "c")
    assert {kind.format for kind in open_bundle(folder).contract.packed} == {"int4_sum"}
    assert len(list(folder.glob("decoder*.engine"))) == (1 if shards else 2)


def test_an_export_without_engines_says_how_to_get_some(plain, traces, tmp_path):
    write(Awq(), plain, tmp_path / "c")
    folder = pipeline.export(job(tmp_path / "c", tmp_path / "b", dtype="float32"), tmp_path / "c", traces)
    with pytest.raises(RuntimeRefusal, match=r"builds no engine of int4_zero weights: .* with --engine tensorrt-rtx"):
        rebuild(folder, "tensorrt-rtx")


FLOATS = {
    "fp8-tensor": (Floats("tensor"), 0),
    "fp8-block": (Floats("block"), 128),
    "compressed-channel": (Floats("channel", "compressed-tensors"), 0),
    "compressed-tensor": (Floats("tensor", "compressed-tensors"), 0),
}


@pytest.mark.parametrize("case", FLOATS)
def test_floats_of_eight_bits_are_those_of_the_definition(case, plain, tmp_path, capsys):
    """Engines alone read them, and test_packed.py builds those; here is what is written."""
    method, block = FLOATS[case]
    expected = write(method, plain, tmp_path / "c")
    tensors = read_checkpoint(tmp_path / "c")
    by_config, prepared = (
        pipeline.prepare(job(tmp_path / "c", "b"), tmp_path / "c", known) for known in (None, tensors)
    )
    assert "how activations or caches are quantised, which is left out" in capsys.readouterr().err
    (kind,) = prepared.contract.packed
    assert (kind.part, kind.format, kind.block, kind.matrices) == ("layers", "fp8", block, LAYERS)
    assert by_config.contract.packed == (kind,) and prepared.dtype == torch.float16
    matched = match_parameters(prepared.model, prepared.tensors)
    wanted = Wanted(prepared.dtype, prepared.packings, matched)
    store(prepared.tensors, wanted, tmp_path, lambda done, total: None)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == prepared.plan.weights
    read = formats._plain(stored)
    for name, weights in expected.items():
        assert torch.equal(read[name], weights), name
    with pytest.raises(Refusal, match=r"proj.weight is fp8, for engines, .* give --dtype float16"):
        pipeline.prepare(job(tmp_path / "c", "b", dtype="float32"), tmp_path / "c", tensors)


def changed(method, **settings):
    """A method's twin whose settings say something else."""
    twin = copy.copy(method)
    twin.settings = {**method.settings, **settings}
    return twin


class Turned(Gptq):
    """Act-order: inputs of a group lie anywhere."""

    def __init__(self):
        super().__init__(order=lambda groups: groups[torch.randperm(len(groups))])


REFUSED = {
    "method": (changed(Gptq(), quant_method="bitsandbytes"), "quantised by 'bitsandbytes'; taken are awq, compressed"),
    "bits": (changed(Gptq(), bits=3), "quantization_config: integers of 3 bits; taken: 4, 8: give the checkpoint that"),
    "act-order": (Turned(), r"model.layers.0.mlp.down_proj.g_idx is not in order \(desc_act, act-order\), and Dequant"),
    "group": (
        Gptq(group=16),
        r"down_proj has \d+ inputs in groups of 16; int4 weights take 128, 64, 32, a whole",
    ),
    "form": (changed(Gptq(), checkpoint_format="marlin"), "checkpoint_format is 'marlin'; taken: gptq, gptq_v2"),
    "8 bits with zeros": (
        Gptq(bits=8, group=32, sym=False),
        "has zero points beside integers of 8 bits; taken are",
    ),
    "gemv": (changed(Awq(), version="gemv"), "version is 'gemv'; taken: gemm"),
    "block": (
        changed(Floats("block"), weight_block_size=[64, 64]),
        r"weight_block_size is \[64, 64\]; taken: \[rows",
    ),
    "turned": (
        changed(Compressed(4, 64), transform_config={"config_groups": {}}),
        "transform_config turns activ",
    ),
    "sparse": (
        changed(Compressed(4, 64), format="marlin-24"),
        "format is 'marlin-24'; taken: pack-quantized, int",
    ),
    "another method's": (changed(Awq(), quant_method="fp8"), "quantised by fp8, and holds no matrix packed so"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_map_is_refused_by_name(case, plain, tmp_path):
    method, message = REFUSED[case]
    write(method, plain, tmp_path / "c")
    with pytest.raises(Refusal, match=message):
        pipeline.prepare(job(tmp_path / "c", "b"), tmp_path / "c", read_checkpoint(tmp_path / "c"))


def test_what_the_job_asks_for_must_fit_what_comes(plain, tmp_path):
    write(Gptq(), plain, tmp_path / "c")
    tensors = read_checkpoint(tmp_path / "c")
    prepare = lambda **fields: pipeline.prepare(job(tmp_path / "c", "b", **fields), tmp_path / "c", tensors)  # noqa: E731
    with pytest.raises(Refusal, match="comes quantised, and --weights int8 would quantise it again; leave it out"):
        prepare(weights="int8")
    kinds = {(kind.part, kind.format) for kind in prepare(vision_weights="int8", head_weights="int8").contract.packed}
    assert kinds == {("layers", "int4"), ("head", "int8"), ("tower", "int8")}  # what comes in floats may be packed
    bias = "model.layers.1.mlp.up_proj.bias"
    tensors[bias] = tensors[next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))]
    with pytest.raises(Refusal, match=f"{bias} is not zero, and the model's layer has no bias"):
        prepare()
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=r"is of a packed matrix, but config.json has no quantization_config"):
        prepare()
    config["text_config"]["quantization_config"] = settings
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    del tensors[bias]
    assert prepare().contract.packed[0].format == "int4"


def test_the_original_is_no_oracle(plain, traces, tmp_path, capsys):
    """transformers would load it by the method's own package."""
    write(Gptq(), plain, tmp_path / "c")
    folder = pipeline.export(job(tmp_path / "c", tmp_path / "b", dtype="float32"), tmp_path / "c", traces)
    assert check_cli.main([str(folder), "--checkpoint", str(tmp_path / "c"), "--tokens", "2"]) == 2
    assert "comes quantised; leave --checkpoint out" in capsys.readouterr().err
