"""The bundle's files in NVIDIA's Polygraphy: inspected, and run on inputs of a real conversation."""

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


def test_inspect_shows_the_contract_and_reads_the_weights(fastv_bundle):
    """A default bundle opens as it is: none of its files has a second hard link, which ``onnx`` refuses to read."""
    contract = open_bundle(fastv_bundle).contract
    for name in ("vision", "embed", "decoder"):
        text = polygraphy("inspect", "model", fastv_bundle / f"{name}.onnx")
        assert "ONNX Opset: 24" in text
        for tensor in (*contract.graphs[name].inputs, *contract.graphs[name].outputs):
            assert f"{tensor.name} [dtype={tensor.dtype}" in text


def test_onnx_loads_every_weight(fastv_bundle):
    import onnx
    from safetensors import safe_open

    model = onnx.load(fastv_bundle / "decoder.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    with safe_open(fastv_bundle / "model.safetensors", "np") as file:
        (name,) = (name for name in file.keys() if name.endswith("layers.3.mlp.up_proj.weight"))  # noqa: SIM118
        stored = file.get_tensor(name)
    assert any(array.shape == stored.shape and (array == stored).all() for array in held.values())


def test_a_linked_bundle_shows_its_graph_alone(export_tiny):
    folder = export_tiny("linked", link_weights=True)
    text = polygraphy("inspect", "model", folder / "decoder.onnx", "--ignore-external-data")
    assert "ONNX Opset: 24" in text
    assert (folder / "model.safetensors").stat().st_nlink > 1


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
