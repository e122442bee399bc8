"""Bundles of packed matrices: parity with an oracle that unpacks them in PyTorch, fused kernels, engines, sizes."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from parity import THOROUGH, assert_parity
from safetensors.torch import save_file

from vlmtrim import runtime
from vlmtrim.export import check_cli, cli, memory, pipeline
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.checkpoint import family_names
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.weights import Wanted, read_checkpoint, read_header, store, tiny
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.formats import Packing, format_names
from vlmtrim.graphs.packed import WITHOUT_ENGINES, Packed
from vlmtrim.runtime.backends import fusing
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.session import Session

SELECTING = {"mllama": "trimmed-llama"}
LAYERS = 4 * 7  # matrices of the tiny models' decoders without cross-attention


def pruned(family):
    """The family's first method, and a length that holds its pictures."""
    return {"method": SELECTING.get(family, "fastv"), **({} if family == "mllama" else {"k": 1, "r": 0.5})}


def fused(path, tmp_path, **entries) -> Counter:
    """Operators that ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.bin")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(
        node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    )


slow = pytest.mark.slow
PACKED = [
    pytest.param(f, w, marks=[slow] * (f not in THOROUGH or (w == "int8" and f != "llava")))
    for f in family_names()
    for w in ("int4", "int8")
]


@pytest.mark.parametrize(("family", "weights"), PACKED)
def test_packed_bundles_equal_pytorch_and_every_matrix_is_fused(family, weights, export_tiny, capsys, tmp_path):
    fields = {"weights": weights, "block": 64 if weights == "int4" else 32, "vision_weights": "int8"}
    folder = export_tiny(f"packed-{weights}", family=family, **pruned(family), **fields)
    assert_parity(folder, capsys, "--tokens", "8")
    contract = open_bundle(folder).contract
    for graph, parts in (("decoder", ("layers", "head")), ("vision", ("tower",))):
        matrices = sum(kind.matrices for kind in contract.packed if kind.part in parts)
        operators = fused(folder / f"{graph}.onnx", tmp_path)
        assert operators["MatMulNBits"] == matrices > 0 and "DequantizeLinear" not in operators
    if family != "mllama":
        assert sum(kind.matrices for kind in contract.packed if kind.part == "layers") == LAYERS


@pytest.mark.parametrize("method", ["zipvl", "pyramid", "none"])
def test_other_methods_are_packed_alike(method, export_tiny, capsys):
    fields = {"tau": 0.9, "bound": 0.75} if method == "zipvl" else {}
    assert_parity(export_tiny("packed", method=method, weights="int4", block=32, **fields), capsys)


def test_float16_activations_run_on_the_same_kernels(export_tiny, capsys, tmp_path):
    folder = export_tiny("packed-half", k=1, r=0.5, dtype="float16", weights="int4", vision_weights="int4")
    assert_parity(folder, capsys)
    assert fused(folder / "decoder.onnx", tmp_path)["MatMulNBits"] == LAYERS + 1


def test_activations_in_eight_bits_are_near_and_are_the_default(export_tiny, capsys):
    """MatMulNBits rounds them; the same bundle run exactly is nearer to the oracle."""
    folder = export_tiny("packed-int4", k=1, r=0.5, weights="int4", block=64, vision_weights="int8")
    assert_parity(folder, capsys, "--tokens", "4", "--activations", "int8")
    errors = []
    for activations in ((), ("--activations", "int8")):
        check_cli.main([str(folder), "--json", "--tokens", "4", *activations])
        rows = json.loads(capsys.readouterr().out)["rows"]
        errors.append(max(row["difference"] for row in rows if "caches" in row["what"]))
    assert errors[0] < 1e-5 < 1e-3 < errors[1]
    assert runtime.make_backend("ort-cpu")._entries == {fusing.LEVEL: "4"}


def test_towers_whose_activations_are_rounded_are_near(export_tiny, capsys, tmp_path):
    """Every matrix of integers, none of floats, and the same answer where they are multiplied unsigned."""
    folder = export_tiny("packed-w8a8", k=1, r=0.5, weights="int4", block=64, vision_weights="w8a8")
    assert_parity(folder, capsys, "--tokens", "4")
    matrices = next(kind.matrices for kind in open_bundle(folder).contract.packed if kind.part == "tower")
    operators = fused(folder / "vision.onnx", tmp_path)
    assert operators["MatMulInteger"] == matrices > 0 and not operators["MatMulNBits"]


@pytest.mark.parametrize("method", ["none", pytest.param("zipvl", marks=slow), pytest.param("pyramid", marks=slow)])
def test_whole_models_may_round_activations(method, export_tiny):
    fields = {"tau": 0.9, "bound": 0.75} if method == "zipvl" else {}
    folder = export_tiny("rounding", method=method, weights="w8a8", vision_weights="w8a8", **fields)
    assert {kind.format for kind in open_bundle(folder).contract.packed} == {"w8a8"}
    assert check_cli.main([str(folder), "--tokens", "4"]) == 0  # where ties decide, logits are not comparable


def test_weights_are_multiplied_unsigned_where_sums_of_signed_ones_do_not_fit(export_tiny, monkeypatch):
    """The processor says so by a product of its largest numbers; both kernels give the same."""
    folder = export_tiny("packed-w8a8", k=1, r=0.5, weights="int4", block=64, vision_weights="w8a8")
    answers = []
    for saturates in (False, True):
        monkeypatch.setattr(fusing, "saturates", lambda *_, told=saturates: told)
        backend = runtime.make_backend("ort-cpu")
        session = Session(open_bundle(folder), backend)
        assert backend._unsigned == ({"vision.onnx"} if saturates else set())
        pictures = session.processor([generated_picture(0)])
        answers.append(backend.to_host(session.encode_images(pictures)))
    assert np.array_equal(*answers)


@slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-user is not installed")
@pytest.mark.parametrize(("processor", "expected"), [("Haswell", "True False"), ("host", "False False")])
def test_a_processor_without_vnni_is_told_by_its_sums(processor, expected):
    code = (
        "import onnxruntime; from vlmtrim.runtime.backends.fusing import saturates, UNSIGNED;"
        "print(*(saturates(onnxruntime, 'CPUExecutionProvider', more) for more in ({}, {UNSIGNED: '1'})))"
    )
    emulator = [] if processor == "host" else ["qemu-x86_64", "-cpu", processor]
    done = subprocess.run([*emulator, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


# All formats of one family, one of all families; the rest is slow. README's table is of all.
ENGINES = [
    pytest.param(f, w, marks=[slow] * (f not in THOROUGH or (w != "int4" and f != "llava")))
    for f in family_names()
    for w in format_names()
    if w not in WITHOUT_ENGINES
]


@pytest.mark.parametrize(("family", "weights"), ENGINES)
def test_engines_are_built_of_every_format(family, weights, export_tiny):
    """All three graphs, prefill and decode profile, float16; packed towers as well."""
    fields = {"dtype": "float16", "engine": "tensorrt-rtx", "weights": weights, "vision_weights": weights}
    folder = export_tiny(f"engine-{weights}", family=family, **pruned(family), **fields)
    prints = json.loads((folder / "engines.json").read_text())
    assert set(prints) == {"vision.engine", "embed.engine", "decoder.engine"}
    assert {"prefill", "decode"} <= set(prints["decoder.engine"]["profiles"])
    if weights in ("fp8", "nvfp4"):
        with pytest.raises(RuntimeRefusal, match=f"ort-cpu does not run {weights} weights: .* has no kernel for them"):
            runtime.open(folder, "ort-cpu")


def test_bfloat16_engines_in_a_chain_of_two(export_tiny):
    fields = {"dtype": "bfloat16", "engine": "tensorrt-rtx", "engine_shards": 2, "weights": "int4"}
    folder = export_tiny("engine-chain", k=1, r=0.5, **fields)
    assert (folder / "decoder-1.engine").stat().st_size > 100_000


def test_what_is_kept_and_what_the_bundle_says(export_tiny):
    folder = export_tiny("keep", k=1, r=0.5, weights="int4", block=32, keep=("*.layers.0.*", "*down_proj*"))
    names = set(read_header(folder / "model.safetensors"))
    floats = {f"{layer}.{matrix}" for layer in range(4) for matrix in ("mlp.up_proj.weight", "mlp.down_proj.weight")}
    floats = {name for name in floats if any(stored.endswith(f"layers.{name}") for stored in names)}
    assert floats == {"0.mlp.up_proj.weight", *(f"{layer}.mlp.down_proj.weight" for layer in range(4))}
    assert {f"model.language_model.layers.1.mlp.up_proj.weight.{part}" for part in ("int4", "int4_scale")} <= names
    kinds = {(kind.part, kind.format, kind.block): kind.matrices for kind in open_bundle(folder).contract.packed}
    assert kinds == {("layers", "int4", 32): 3 * 6, ("head", "int8", 32): 1}
    job = json.loads((folder / "job.json").read_text())
    assert (job["weights"], job["block"], job["keep"]) == ("int4", 32, ["*.layers.0.*", "*down_proj*"])


def test_the_plan_foresees_what_is_written(export_tiny, tmp_path):
    """Weights in the bundle, and the pieces that engines are cut into."""
    source = tiny.write_checkpoint(checkpoints.load_family("qwen2_vl"), tmp_path / "c")
    packing = {"weights": "int4", "block": 32}
    bundle = export_tiny("planned", family="qwen2_vl", method="none", **packing)
    plan = lambda **fields: pipeline.prepare(  # noqa: E731
        Job(str(source), str(tmp_path / "b"), None, max_seq_len=512, **fields), source, read_checkpoint(source)
    )
    prepared, floats = plan(**packing), plan()
    written = sum(tensor.length for tensor in read_header(bundle / "model.safetensors").values())
    assert prepared.plan.weights == written
    assert prepared.contract.packed == open_bundle(bundle).contract.packed
    packed = sum(kind.nbytes for kind in prepared.contract.packed)
    weights = sum(kind.weights for kind in prepared.contract.packed)
    assert any(line.split()[:3] == ["of", "it", "layers"] for line in prepared.plan_lines)
    assert floats.plan.decoder - prepared.plan.decoder == 4 * weights - packed
    _, tail = memory.layer_bytes(prepared.plan.decoder, prepared.contract)
    assert tail == next(kind.nbytes for kind in prepared.contract.packed if kind.part == "head")
    step, dense = (p.contract.step_bytes([0] * len(p.contract.groups)) for p in (prepared, floats))
    assert dense - step == 4 * weights - packed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "32"], "--block and --keep are of weights in fewer bits; give --weights or --vision-weights"),
        (["--weights", "int4", "--block", "16"], "--block is 16; int4 weights take 128, 64, 32, channel"),
        (["--weights", "fp8", "--block", "64"], "--block is 64; fp8 weights take channel, 128"),
        (["--weights", "nvfp4", "--dtype", "float32"], "nvfp4 weights are for engines, .* give --dtype float16"),
        (["--weights", "nvfp4"], r"proj.weight is nvfp4, for engines, .* give --dtype float16"),  # of a float32 model
        (
            ["--vision-weights", "w8a8", "--engine", "tensorrt-rtx"],
            "no engine is built of w8a8 weights, since tensorrt-r",
        ),
        (["--weights", "int4", "--link-weights"], "--link-weights links the checkpoint's files, and --weights writes"),
        (["--dtype", "float16", "--link-weights"], "--link-weights: weights are stored as float16, in files of their"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(arguments, message, capsys):
    assert cli.main(["--model", "tiny:llava", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_pattern_that_fits_nothing_and_matrices_that_no_block_divides(tmp_path, capsys):
    source = tiny.write_checkpoint(checkpoints.load_family("llava"), tmp_path / "c")
    with pytest.raises(Refusal, match=r"--keep \*.mlpp.\* fits no matrix; they are named like model\."):
        pipeline.prepare(Job(str(source), "b", max_seq_len=512, weights="int4", keep=("*.mlpp.*",)), source, None)
    with pytest.raises(Refusal, match="no matrix is left to be stored in fewer bits"):
        pipeline.prepare(Job(str(source), "b", max_seq_len=512, weights="int4", keep=("*",)), source, None)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    matrix = torch.zeros(8, 64)
    matrix[3, 5] = float("nan")
    save_file({"a.weight": matrix}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = Wanted(torch.float32, {"b.weight": Packing("int4", 32)}, {"b.weight": "a.weight"})
    (tmp_path / "out").mkdir()
    with pytest.raises(Refusal, match=r"b.weight holds values that are not finite, which int4 cannot hold"):
        store(read_checkpoint(tmp_path), wanted, tmp_path / "out", lambda *_: None)


@pytest.mark.parametrize("block", [32, 64, 128, 0])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_this_onnx_runtime_fuses_every_form(name, block):
    kind = Packed("layers", name, block, 1, 1, 1)
    for dtype in ("float32", "float16"):
        assert fusing.fuses(onnxruntime, "CPUExecutionProvider", kind, dtype, {fusing.LEVEL: "4"})
    assert not fusing.fuses(onnxruntime, "CPUExecutionProvider", kind, "bfloat16", {fusing.LEVEL: "4"})


def test_what_is_not_fused_is_refused_with_the_floats_that_it_would_make(export_tiny, monkeypatch):
    folder = export_tiny("packed-int4", k=1, r=0.5, weights="int4", block=64, vision_weights="int8")
    monkeypatch.setattr(fusing, "KERNEL", b"MatMulNothing")
    with pytest.raises(RuntimeRefusal, match=r"ort-cpu does not run .* would turn \d+ matrices into .* GB of floats"):
        runtime.open(folder)


def test_packed_weights_that_do_not_fit_are_not_read_from_the_file(export_tiny, monkeypatch):
    """That is the way out for floats; packed ones would be unpacked at every step."""
    folder = export_tiny("packed-int4", k=1, r=0.5, weights="int4", block=64, vision_weights="int8")
    monkeypatch.setattr("vlmtrim.runtime.backends.ort.free_memory", lambda: 1e6)
    with pytest.raises(RuntimeRefusal, match=r"the bundle's weights take .* GB of memory, 0.0 GB are free; free some"):
        runtime.open(folder)
