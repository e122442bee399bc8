"""VisionZip on a hand-made tower of one layer against the same choice in numpy."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden_text import assert_golden
from oracles import visionzip

from vlmtrim.graphs import GraphError
from vlmtrim.graphs.methods.visionzip import VisionZip
from vlmtrim.graphs.ops import Ops

GOLDEN = Path(__file__).parent / "golden" / "visionzip.txt"
WIDTH, HEADS, OUT = 16, 2, 12


def tower(tokens, has_class, norm=True, twice=False):
    """(model: states [I, T, Dv] -> attention, a residual MLP -> class token off -> a projection; what it returns of its
    last layer)."""
    random, ops, size = np.random.default_rng(0), Ops("tower"), WIDTH // HEADS

    def weight(*shape):
        return ops.const(random.normal(size=shape) / shape[0] ** 0.5, np.float32)

    entered = ir.Value(name="pixel_values", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("I", tokens, WIDTH)))
    parts = []
    for _ in range(3):
        heads = ops("Reshape", ops("MatMul", entered, weight(WIDTH, WIDTH)), ops.const([0, 0, HEADS, size]))
        parts.append(ops("Transpose", heads, perm=[0, 2, 1, 3]))
    query = ops("Mul", parts[0], ops.const(size**-0.5, np.float32))
    attended = ops("Transpose", ops("Attention", query, *parts[1:], scale=1.0), perm=[0, 2, 1, 3])
    attended = ops("Add", entered, ops("Reshape", attended, ops.const([0, 0, WIDTH])))
    normed = ops("LayerNormalization", attended, ops.const(np.ones(WIDTH), np.float32)) if norm else attended
    states = ops("Add", attended, ops("Tanh", ops("MatMul", normed, weight(WIDTH, WIDTH))))
    patches = ops.slice(states, ops.const([1]), ops.const([tokens]), axis=1) if has_class else states
    if twice:
        patches = ops("Add", patches, ops.slice(states, ops.const([0]), ops.const([tokens - has_class]), axis=1))
    projection = weight(WIDTH, OUT)
    features = ops("MatMul", patches, projection)
    features.name, features.type = "image_features", ir.TensorType(ir.DataType.FLOAT)
    features.shape = ir.Shape(("I", tokens - has_class, OUT))
    told = {"query": parts[0], "key": parts[1], "states": states, "projection": projection}
    for name, value in told.items():
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([entered], [features], nodes=ops.nodes, opset_imports={"": 24}, name="tower")
    return ir.Model(graph, ir_version=11), told


def run(model, pictures, *more):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(["image_features", *more], {"pixel_values": pictures})


@pytest.mark.parametrize("has_class", [True, False])
@pytest.mark.parametrize("patches", [16, 49])
@pytest.mark.parametrize(("r", "contextual"), [(0.75, 0.15625), (0.5, 0.3), (0.9, 0.0), (0.25, 0.9), (0.05, 0.15625)])
def test_what_stays_and_what_is_merged_equal_numpy(has_class, patches, r, contextual):
    """Two pictures in one step; also where there are more targets than others, and nothing to merge."""
    tokens = patches + has_class
    pictures = np.random.default_rng(patches).normal(size=(2, tokens, WIDTH)).astype(np.float32)
    plain, told = tower(tokens, has_class)
    plain.graph.outputs.extend(told.values())
    _, query, key, states, projection = run(plain, pictures, *told)
    logits = np.einsum("ihtd,ihsd->ihts", query, key) * (WIDTH // HEADS) ** -0.5
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    method = VisionZip(r, contextual)
    count = method.image_tokens(patches)
    merged = min(round(count * contextual), count - 1 - has_class)
    found = run(method(tower(tokens, has_class)[0], patches=patches), pictures)[0]
    assert found.shape == (2, count, OUT)
    for picture in range(2):
        expected = visionzip.kept(states[picture], attention[picture], key[picture], has_class, count, merged)
        np.testing.assert_allclose(found[picture], expected @ projection, rtol=0, atol=2e-5)


def test_nothing_removed_leaves_the_graph_as_it_is():
    model = tower(17, True)[0]
    before = len(list(model.graph))
    assert len(list(VisionZip(0.0)(model, patches=16).graph)) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 1.0}, "r is 1.0; give the share of visual tokens to remove"),
        ({"contextual": 1.0}, "contextual is 1.0; give the share of kept tokens to merge"),
    ],
)
def test_shares_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VisionZip(**fields)


def test_too_few_tokens_and_other_towers_are_refused():
    with pytest.raises(ValueError, match=r"r 0\.95 keeps 1 of a picture's 16 visual tokens; give a smaller r"):
        VisionZip(0.95).image_tokens(16)
    with pytest.raises(GraphError, match="its states are not found"):
        VisionZip()(tower(17, True, norm=False)[0], patches=16)
    with pytest.raises(GraphError, match="are read by Slice, Slice; expected features of this layer alone"):
        VisionZip()(tower(17, True, twice=True)[0], patches=16)
    with pytest.raises(GraphError, match="expected 20 tokens"):
        VisionZip()(tower(17, True)[0], patches=20)


def test_the_graph_of_the_choice_is_the_golden_text():
    assert_golden(VisionZip()(tower(17, True)[0], patches=16).graph, GOLDEN, "zip/")
