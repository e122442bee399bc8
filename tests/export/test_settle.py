"""Programs of torch.export that torch.onnx need not decompose give the graphs of those that it does."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from vlmtrim.export.tracing import settle, trace
from vlmtrim.graphs.contract import GraphSpec, TensorSpec


class Replaced(nn.Module):
    """Every operator that is replaced, on what is transposed as well."""

    def __init__(self, padding="valid"):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2, padding=padding)

    def forward(self, pixels):
        """pixels [I, 3, 6, 6] -> [I, 3, 24]."""
        found = self.patches(pixels).flatten(2).transpose(1, 2)
        seen = (found > 0) & (found.reshape(found.shape[0], 3, -1).reshape(found.shape) < 0.5)
        return (found * seen.to(pixels.dtype).to("cpu")).reshape(found.shape[0], 3, -1)


class Written(nn.Module):
    def forward(self, pixels):
        """An operator that writes into its input."""
        return pixels.flatten(1).clone().add_(1)


class Untranslated(nn.Module):
    def forward(self, pixels):
        """An operator without a translation, behind one that is replaced."""
        return torch.bucketize(pixels.flatten(1), torch.tensor([-0.5, 0.0, 0.5])).to(pixels.dtype)


def traced(module):
    out = tuple(module(torch.zeros(2, 3, 6, 6)).shape[1:])
    spec = GraphSpec(
        "made.onnx",
        (TensorSpec("pixels", "float32", ("I", 3, 6, 6)),),
        (TensorSpec("out", "float32", ("I", *out)),),
    )
    plan = trace.Plan(module.eval(), (torch.zeros(2, 3, 6, 6),), ({0: Dim("I", max=9)},), spec)
    return trace.trace.real(plan)  # not one that tests share


def nodes(model):
    """Operators with what they read: inputs and weights by name, constants by value, other nodes by their place."""
    graph = [node for node in model.graph if node.op_type != "Constant"]
    made = {id(value): place for place, node in enumerate(graph) for value in node.outputs}

    def read(value):
        constant = value and ir.convenience.get_const_tensor(value)
        named = value and (value.is_graph_input() or value.name.startswith("patches."))
        return value and (value.name if named else constant.numpy().tolist() if constant else made[id(value)])

    return [(node.op_type, [read(value) for value in node.inputs]) for node in graph]


@pytest.mark.parametrize("module", [Replaced(), Written(), Untranslated()], ids=lambda module: type(module).__name__)
def test_the_graph_is_that_of_a_decomposed_program(module, monkeypatch):
    made = traced(module)
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString())
    for images in (1, 3):
        pixels = np.random.default_rng(images).standard_normal((images, 3, 6, 6), np.float32)
        want = module(torch.from_numpy(pixels)).detach().numpy()
        assert np.allclose(session.run(None, {"pixels": pixels})[0], want, atol=1e-5)
    assert len(session.run(None, {"pixels": np.zeros((0, 3, 6, 6), np.float32)})[0]) == 0
    monkeypatch.setattr(trace, "settle", lambda program: program)
    assert nodes(traced(module)) == nodes(made)
    monkeypatch.setattr(trace, "sizes", None)  # of another torch
    assert nodes(traced(module)) == nodes(made)


@pytest.mark.parametrize(("module", "kind"), [(Replaced(), settle.Settled), (Written(), ExportedProgram)])
def test_only_what_writes_into_an_input_is_left_to_decompose(module, kind):
    program = torch.export.export(module.eval(), (torch.zeros(2, 3, 6, 6),), dynamic_shapes=({0: Dim("I", max=9)},))
    settled = settle.settle(program)
    assert type(settled) is kind
    remaining = {node.target for node in settled.graph.nodes}
    assert bool(remaining & set(settle.REPLACED)) == (kind is ExportedProgram)
