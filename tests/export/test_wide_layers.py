"""Layers of a float16 decoder in float32: what overflowed does not, and --calibrate says which layers those are."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from parity import assert_parity
from safetensors.torch import load_file, save_file

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import cli, pipeline
from vlmtrim.export.job import Job
from vlmtrim.export.weights import tiny
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods import make_method
from vlmtrim.runtime.image import generated_picture

LOUD = 2  # the layer whose MLP leaves float16
METHODS = {
    "fastv": {"k": 1, "r": 0.5},
    "fastv in the layer": {"k": 3, "r": 0.5},
    "zipvl": {"tau": 0.9, "bound": 0.75},
    "tidal": {"entries": 9, "selecting": (1,)},
    "none": {},
}


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A checkpoint whose products of gate and up in one layer reach hundreds of thousands, scaled down again."""
    source = tiny.write_checkpoint(checkpoints.load_family("llava"), tmp_path_factory.mktemp("loud") / "c")
    tensors = load_file(source / "model.safetensors")
    for name, factor in (("gate_proj", 400.0), ("up_proj", 400.0), ("down_proj", 1 / 160000.0)):
        tensors[next(n for n in tensors if n.endswith(f"layers.{LOUD}.mlp.{name}.weight"))] *= factor
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture(scope="module")
def export(loud, tmp_path_factory):
    traces: dict = {}

    def run(method="none", name=None, **fields):
        given = METHODS[name or method]
        job = Job(str(loud), str(tmp_path_factory.mktemp("wide") / "b"), make_method(method, **given), **fields)
        return pipeline.export(pipeline.dataclasses.replace(job, dtype="float16", max_seq_len=512), loud, traces)

    return run


def evaluated(folder) -> np.ndarray:
    """Logits [V] of three tokens by ONNX's own evaluator, which rounds every value to the dtype that the graph says;
    ONNX Runtime's CPU provider joins neighbours in float32, so it would not show what overflows."""
    from onnx.reference import ReferenceEvaluator

    model, sizes = onnx.load(folder / "decoder.onnx"), {"B": 1, "S": 3, "W0": 3}
    feeds = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
        feeds[value.name] = np.zeros(shape, ir.DataType(kind.elem_type).numpy())
    embeds = feeds["inputs_embeds"]
    embeds[:] = np.random.default_rng(0).normal(size=embeds.shape)
    feeds["position_ids"][:] = feeds["key_positions.0"][:] = np.arange(3)
    feeds["last_index"][:] = 2
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(["logits"], feeds)[0][0]


def test_what_overflows_in_float16_is_right_with_its_layer_in_float32(export, capsys):
    assert not np.isfinite(evaluated(export())).all()
    folder = export(fp32_layers=(LOUD,))
    logits = evaluated(folder)
    assert logits.dtype == np.float16 and np.isfinite(logits).all()
    capsys.readouterr()
    assert_parity(folder, capsys, "--tokens", "8")


@pytest.mark.parametrize("name", ["fastv", "fastv in the layer", "zipvl"])
def test_pruned_decoders_have_such_layers_too(name, export, capsys):
    """With the selection before, behind and in what is wide."""
    folder = export(name.partition(" ")[0], name, fp32_layers=(LOUD,))
    assert_parity(folder, capsys, "--tokens", "8")


@pytest.mark.parametrize("layers", [(0,), (LOUD, 3), (0, LOUD), (0, 1, LOUD, 3)])
def test_first_last_and_several_layers(layers, export, capsys):
    folder = export("fastv", fp32_layers=layers)
    if LOUD in layers:
        assert_parity(folder, capsys, "--tokens", "4")
    decoder = ir.load(folder / "decoder.onnx")
    swish = [node.outputs[0].dtype for node in decoder.graph if node.op_type == "Sigmoid"]
    assert swish == [ir.DataType.FLOAT if index in layers else ir.DataType.FLOAT16 for index in range(4)]
    assert {value.dtype for value in decoder.graph.outputs if "present" in value.name} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("method", ["none", "tidal"])
def test_layers_apart_share_what_they_read_and_caches_stay_narrow(method, export, capsys):
    """Both read the rotary tables, which are cast once; entries are gathered of caches, which are not cast."""
    folder = export(method, fp32_layers=(0, LOUD))
    decoder = ir.load(folder / "decoder.onnx")
    casts = [node for node in decoder.graph if node.op_type == "Cast"]
    assert len({node.outputs[0].name for node in casts}) == len(casts)
    assert not any("present" in str(node.inputs[0].name) for node in casts)
    assert_parity(folder, capsys, "--tokens", "4")


def test_packed_weights_and_engines_go_with_them(export, capsys):
    """Layers in float32 keep their float weights; a chain of two engines is built."""
    fields = {"weights": "int4", "block": 32, "engine": "tensorrt-rtx", "engine_shards": 2}
    folder = export("fastv", fp32_layers=(LOUD,), **fields)
    assert sum(kind.matrices for kind in open_bundle(folder).contract.packed if kind.part == "layers") == 3 * 7
    assert (folder / "decoder-1.engine").stat().st_size > 100_000
    assert_parity(folder, capsys, "--tokens", "4")


def test_pictures_say_which_layers_leave_the_range(loud, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    generated_picture(1).save(pictures / "one.png")
    common = ["--model", str(loud), "--dtype", "float16", "--max-seq-len", "512", "--calibrate", str(pictures)]
    assert cli.main([*common, "--output", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err
    assert (
        f"warning: values of layers {LOUD} reach" in said and f"--fp32-layers {LOUD}, or with --dtype bfloat16" in said
    )
    largest = json.loads((tmp_path / "a" / "job.json").read_text())["largest"]
    assert len(largest) == 4 and largest[LOUD] > 65504 > 1000 > max(largest[:LOUD])
    assert cli.main([*common, "--output", str(tmp_path / "b"), "--fp32-layers", str(LOUD)]) == 0
    assert "reach" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp32-layers", "0"], "--fp32-layers are layers of --dtype float16; the dtype is auto: leave them out"),
        (["--dtype", "float16", "--fp32-layers", "4,1"], "--fp32-layers names layer 4; the model has layers 0 to 3"),
    ],
)
def test_layers_that_there_are_not(arguments, message, capsys):
    assert cli.main(["--model", "tiny:llava", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_word_is_no_layer(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--model", "demo", "--fp32-layers", "first"])
    assert "'first' is no list of layers such as 0,1,30" in capsys.readouterr().err
