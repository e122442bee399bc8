"""Fused norms and rotary embeddings against numpy, and what is said where the pattern differs."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.passes.fuse import fuse

WIDTH, HEADS, SIZE, EPSILON = 12, 2, 8, 1e-3
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=WIDTH)


def model(ops, inputs, output, dtype):
    output.name, output.type = "out", ir.TensorType(dtype)
    return ir.Model(ir.Graph(inputs, [output], nodes=ops.nodes, opset_imports={"": 24}, name="g"), ir_version=10)


def norm(dtype=ir.DataType.FLOAT, exponent=2.0, axis=-1, root="Sqrt", one_plus=False):
    """The spelling of transformers' Llama: all in float32, the weight applied in the model's dtype; or of its Gemma 3,
    which scales by 1 + weight in float32 (``one_plus``)."""
    ops = Ops("norm")
    x = ir.val("x", dtype=dtype, shape=("B", "S", WIDTH))
    wide = ops("Cast", x, to=ir.DataType.FLOAT)
    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    mean = ops("ReduceMean", ops("Pow", wide, ops.const(exponent, np.float32)), ops.const([axis]))
    inverse = ops("Reciprocal", ops(root, ops("Add", mean, ops.const(EPSILON, np.float32))))
    normal = ops("Mul", wide, inverse)
    weight = ops.const(WEIGHT - one_plus, dtype.numpy())
    weight.type, weight.shape = ir.TensorType(dtype), ir.Shape([WIDTH])
    if one_plus:
        scale = ops("Add", ops.const(1.0, np.float32), ops("Cast", weight, to=ir.DataType.FLOAT))
        scale.type, scale.shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
        return model(ops, [x], ops("Cast", ops("Mul", normal, scale), to=dtype), dtype)
    narrow = ops("Cast", normal, to=dtype)
    return model(ops, [x], ops("Mul", weight, narrow), dtype)


def rotary(dtype=ir.DataType.FLOAT, half=SIZE // 2, swapped=False):
    ops = Ops("rotary")
    x = ir.val("x", dtype=dtype, shape=("B", HEADS, "S", SIZE))
    angles = ir.val("angles", dtype=dtype, shape=("B", "S", SIZE))
    cosine, sine = (ops("Unsqueeze", ops(name, angles), ops.const([1])) for name in ("Cos", "Sin"))
    low = ops("Slice", x, ops.const([0]), ops.const([half]), ops.const([3]), ops.const([1]))
    high = ops("Slice", x, ops.const([half]), ops.const([2**62]), ops.const([3]), ops.const([1]))
    parts = (low, ops("Neg", high)) if swapped else (ops("Neg", high), low)
    turned = ops("Concat", *parts, axis=-1)
    return model(ops, [x, angles], ops("Add", ops("Mul", x, cosine), ops("Mul", turned, sine)), dtype)


def operators(graph):
    return [node.op_type for node in graph.graph]


def run(graph, evaluator, **feeds):
    proto = ir.to_proto(graph)
    if evaluator == "reference":
        return ReferenceEvaluator(proto).run(None, feeds)[0]
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("evaluator", ["onnxruntime", "reference"])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_norm_is_numpys(evaluator, dtype):
    graph = norm(dtype)
    fuse(graph, {"RMSNormalization": 1})
    assert operators(graph) == ["Constant", "RMSNormalization"]
    # Squares of such values overflow float16; onnx's evaluator squares in the input's dtype, whatever stash_type says.
    size = 100 if evaluator == "onnxruntime" else 1
    x = (size * RANDOM.normal(size=(2, 5, WIDTH))).astype(dtype.numpy())
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * WEIGHT
    tolerance = 1e-6 if dtype == ir.DataType.FLOAT else 4e-3
    np.testing.assert_allclose(run(graph, evaluator, x=x), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_a_norm_that_scales_by_one_plus_its_weight_stays_in_float32(dtype):
    graph = norm(dtype, one_plus=True)
    fuse(graph, {"RMSNormalization": 1})
    assert operators(graph)[-2:] == ["RMSNormalization", "Cast"] and "Reciprocal" not in operators(graph)
    x = RANDOM.normal(size=(2, 5, WIDTH)).astype(dtype.numpy())
    wide, weight = x.astype(np.float64), 1 + (WEIGHT - 1).astype(dtype.numpy()).astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * weight
    np.testing.assert_allclose(
        run(graph, "onnxruntime", x=x), expected, rtol=1e-5 if dtype == ir.DataType.FLOAT else 1e-3
    )


@pytest.mark.parametrize("evaluator", ["onnxruntime", "reference"])
def test_rotary_is_a_rotation_of_complex_numbers(evaluator):
    graph = rotary()
    fuse(graph, {"RotaryEmbedding": 1})
    assert operators(graph).count("RotaryEmbedding") == 1
    assert "Neg" not in operators(graph)
    x = RANDOM.normal(size=(2, HEADS, 5, SIZE)).astype(np.float32)
    angles = RANDOM.normal(size=(2, 5, SIZE // 2)).astype(np.float32)
    complex_x = x[..., : SIZE // 2] + 1j * x[..., SIZE // 2 :]
    turned = complex_x * np.exp(1j * angles)[:, None]
    found = run(graph, evaluator, x=x, angles=np.concatenate([angles, angles], -1))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)


@pytest.mark.parametrize(
    ("graph", "operator", "why"),
    [
        (norm(exponent=3.0), "RMSNormalization", "exponent is 3"),
        (norm(axis=1), "RMSNormalization", "not over the last axis"),
        (norm(root="Exp"), "RMSNormalization", "read by Exp; expected one Sqrt"),
        (rotary(half=2), "RotaryEmbedding", "only whole heads"),
        (rotary(swapped=True), "RotaryEmbedding", "joined as"),
    ],
)
def test_the_nearest_miss_is_named(graph, operator, why):
    before = operators(graph)
    with pytest.raises(GraphError, match=f"recognised 0 times, the model's layers hold 1.*{why}"):
        fuse(graph, {operator: 1})
    assert operators(graph) == before


def test_one_more_than_expected_is_refused():
    with pytest.raises(GraphError, match="recognised 1 times, the model's layers hold 0"):
        fuse(norm(), {"RMSNormalization": 0})


def test_nothing_is_fused_unasked():
    graph = norm()
    fuse(graph, {})
    assert "RMSNormalization" not in operators(graph)
