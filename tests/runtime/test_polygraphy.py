"""The bundle's files in NVIDIA's Polygraphy: inspected, and run on inputs of a real conversation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtrim.graphs.bundle import open_bundle

pytest.importorskip("polygraphy")
ROOT = Path(__file__).resolve().parents[2]


def polygraphy(*argv):
    command = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_inspect_shows_the_contract(fastv_bundle):
    """``onnx`` refuses to read weights out of a hard-linked file; their names and shapes need none of them."""
    contract = open_bundle(fastv_bundle).contract
    for name in ("vision", "embed", "decoder"):
        text = polygraphy("inspect", "model", fastv_bundle / f"{name}.onnx", "--ignore-external-data")
        assert "ONNX Opset: 24" in text
        for tensor in (*contract.graphs[name].inputs, *contract.graphs[name].outputs):
            assert f"{tensor.name} [dtype={tensor.dtype}" in text


def test_inspect_reads_the_weights_of_a_copied_bundle(fastv_bundle, tmp_path):
    folder = shutil.copytree(fastv_bundle, tmp_path / "copy")
    assert "Opset: 24" in polygraphy("inspect", "model", folder / "decoder.onnx")


def test_onnx_runtime_runs_the_graphs_on_the_inputs_of_a_conversation(fastv_bundle, tmp_path):
    """The same inputs give the same outputs in a second run, and the commands name every dynamic input."""
    script = [sys.executable, str(ROOT / "scripts" / "polygraphy_inputs.py"), str(fastv_bundle), str(tmp_path)]
    commands = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert commands.count("polygraphy run") == 3 and commands.count("--trt-opt-shapes") == 1 + 2 + 2
    assert "visual_positions:[1,16]" in commands and "key_positions.1:[" in commands
    graph, inputs, outputs = fastv_bundle / "decoder.onnx", tmp_path / "decoder.json", tmp_path / "out.json"
    polygraphy("run", graph, "--onnxrt", "--load-inputs", inputs, "--save-outputs", outputs)
    told = polygraphy("run", graph, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs)
    assert "Passed: 2/2 iterations" in told
