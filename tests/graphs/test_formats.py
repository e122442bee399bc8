"""Formats of packed matrices: what is stored, read again in PyTorch, is near what was packed; the pass puts it in."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir import val

from vlmtrim.export.oracles import formats as oracle
from vlmtrim.graphs import formats
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.formats import Packing, check_block, fitting_block, format_names, load_format
from vlmtrim.graphs.formats.int4 import SHRINK
from vlmtrim.graphs.formats.scales import symmetric
from vlmtrim.graphs.packed import FORMATS
from vlmtrim.graphs.passes.quantise import quantise
from vlmtrim.graphs.passes.widen import widen

K, N = 384, 24
# Largest error of a weight, as a share of the largest magnitude of its block: half a step, or what clipping leaves.
ERRORS = {"int4": 0.31, "int8": 0.5 / 127 + 1e-6, "fp8": 1 / 16, "nvfp4": 1 / 6 + 1 / 16, "w8a8": 0.5 / 127 + 1e-6}
CASES = [(name, block) for name in format_names() for block in load_format(name).BLOCKS]
TORCH = {"int8": torch.int8, "float8e4m3fn": torch.float8_e4m3fn, "int4": torch.uint8, "float4e2m1": torch.uint8}


def matrix(seed: int = 0) -> np.ndarray:
    """float32 [K, N] with an outlier in every column, and a column of zeros."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 0.02, (K, N)).astype(np.float32)
    values[random.integers(0, K, N), np.arange(N)] *= 20
    values[:, 3] = 0
    return values


def stored(values: np.ndarray, packing: Packing, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The arrays of a matrix as a bundle's file holds them, by name."""
    arrays = packing.arrays(*values.shape, dtype)
    packed = load_format(packing.format).pack(values, packing.block, dtype)
    found = {}
    for array, data in zip(arrays, packed, strict=True):
        raw = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy())
        assert raw.numel() == array.nbytes
        kind = TORCH.get(array.dtype) or getattr(torch, array.dtype)
        shape = (array.nbytes,) if kind == torch.uint8 else array.shape
        found[f"w.{array.suffix}"] = raw.view(kind).reshape(shape)
    return found


def restored(values: np.ndarray, packing: Packing, dtype: str = "float32") -> np.ndarray:
    """What the oracle reads of it, [K, N]."""
    return oracle._plain(stored(values, packing, dtype))["w"].t().numpy()


def test_every_format_has_an_oracle_and_a_name_in_the_contract():
    assert sorted((*format_names(), *formats.GIVEN)) == sorted(FORMATS) == sorted(oracle.FORMATS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "block"), CASES)
def test_what_is_read_is_near_what_was_packed(name, block, dtype):
    values = matrix()
    error = np.abs(restored(values, Packing(name, block), dtype) - values)
    length = block or K
    largest = np.abs(values).reshape(-1, length, N).max(axis=1).repeat(length, axis=0)
    slack = 2**-8 if dtype == "bfloat16" else 2**-11  # of the scales, which are rounded themselves
    assert (error <= largest * (ERRORS[name] + slack) + 1e-9).all()
    assert (error[:, 3] == 0).all()


@pytest.mark.parametrize("block", [32, 128])
def test_scales_that_are_searched_are_better_than_those_of_the_largest(block):
    """And never worse, block by block: the largest magnitude is among what is tried."""
    values = matrix()
    blocks = values.reshape(-1, block, N)
    step = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    plain = np.clip(np.rint(blocks / np.where(step == 0, 1, step)), -8, 7) * step
    squared = lambda found: np.square(found.reshape(blocks.shape) - blocks).sum(axis=1)  # noqa: E731
    searched = squared(restored(values, Packing("int4", block)))
    assert (searched <= squared(plain) * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < 0.95 * squared(plain).sum()


def test_importance_moves_errors_to_inputs_that_count_less():
    values, importance = matrix(), np.ones(K, np.float32)
    importance[::2] = 100
    even = np.square(restored(values, Packing("int4", 128)) - values)[::2].sum()
    codes, scales = symmetric(values, 128, "float32", -8, 7, SHRINK, importance)
    weighed = codes * scales.repeat(128, axis=0)
    assert np.square(weighed - values)[::2].sum() < even


def test_nothing_is_packed_all_at_once(monkeypatch):
    """In slices of any size the same comes out."""
    whole = restored(matrix(), Packing("int4", 32))
    monkeypatch.setattr("vlmtrim.graphs.formats.scales.SLICE", 32 * N * 2)
    assert np.array_equal(restored(matrix(), Packing("int4", 32)), whole)


def test_blocks_fit_the_inputs_or_are_refused():
    assert [fitting_block("int4", size, 128) for size in (4096, 896, 192, 96, 72)] == [128, 128, 64, 32, None]
    assert fitting_block("int8", 128, 128) == fitting_block("int8", 32, 64) == formats.CHANNEL
    assert fitting_block("int4", 72, formats.CHANNEL) == formats.CHANNEL
    assert fitting_block("nvfp4", 72, 16) is None
    with pytest.raises(GraphError, match="--block is 16; int4 weights take 128, 64, 32, channel"):
        check_block("int4", 16)
    with pytest.raises(GraphError, match="--block is channel; nvfp4 weights take 16"):
        check_block("nvfp4", formats.CHANNEL)


def linear_graph(bias: bool, gemm: bool, output: bool = False) -> ir.Model:
    """x [B, K] times a matrix ``w`` [N, K], as torch's exporter writes a linear layer."""
    x = val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["B", K]))
    weight = val("w", dtype=ir.DataType.FLOAT, shape=ir.Shape([N, K]))
    b = val("b", const_value=ir.tensor(np.arange(N, dtype=np.float32), name="b"))
    if gemm:
        nodes = [ir.node("Gemm", [x, weight, b] if bias else [x, weight], attributes={"transB": 1})]
    else:
        turned = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        nodes = [turned, ir.node("MatMul", [x, turned.outputs[0]])]
    y = nodes[-1].outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["B", N])
    if not output:
        nodes.append(ir.node("Neg", [y]))
        nodes[-1].outputs[0].name = "z"
        nodes[-1].outputs[0].dtype, nodes[-1].outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["B", N])
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[weight, b], opset_imports={"": 24})
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize(("bias", "gemm"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(("name", "block"), [(n, b) for n, b in CASES if n.startswith("int")])
def test_a_linear_layer_reads_what_is_packed(name, block, bias, gemm, output):
    """On ONNX Runtime, against numpy on what the oracle reads."""
    import onnxruntime

    values, model = matrix(), linear_graph(bias, gemm, output)
    quantise(model, {"w": Packing(name, block)})
    kinds = {"int4": ir.DataType.INT4}
    for key, tensor in stored(values, Packing(name, block)).items():
        value = model.graph.initializers[key]
        if value.dtype in kinds.values():
            flat = tensor.numpy()
            codes = np.stack([flat & 15, flat >> 4], 1).reshape(K, N).astype(np.int8)
            codes = np.where(codes > 7, codes - 16, codes)
            value.const_value = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name=key)
        else:
            value.const_value = ir.tensor(tensor.numpy(), name=key)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    expected = x @ restored(values, Packing(name, block)) + (np.arange(N) if bias else 0)
    assert np.allclose(found, expected if output else -expected, atol=1e-4)
    assert "w" not in model.graph.initializers


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("block", [32, formats.CHANNEL])
@pytest.mark.parametrize("name", formats.GIVEN)
def test_zero_points_are_subtracted(name, block, rank):
    """Of DequantizeLinear or as sums of inputs: the same product, on ONNX Runtime against numpy."""
    import onnxruntime

    random = np.random.default_rng(0)
    shape = (K // block, N) if block else (N,)
    codes, points = (random.integers(-8, 8, size).astype(np.int8) for size in ((K, N), shape))
    scales = random.uniform(0.01, 0.02, shape).astype(np.float32)
    last = points if name == "int4_zero" else scales * points
    model = linear_graph(True, False)
    model.graph.inputs[0].shape = ir.Shape(["B", K] if rank == 2 else ["B", "S", K])
    quantise(model, {"w": Packing(name, block)})
    held = {}
    for array, values in zip(Packing(name, block).arrays(K, N, "float32"), (codes, scales, last), strict=True):
        key = f"w.{array.suffix}"
        kind = ir.DataType.INT4 if array.dtype == "int4" else ir.DataType.FLOAT
        model.graph.initializers[key].const_value = ir.tensor(values.astype(kind.numpy()), dtype=kind, name=key)
        held[key] = torch.from_numpy(formats.nibbles(values) if array.dtype == "int4" else values)
    read = oracle._plain(held)["w"].t().numpy()
    expected = (codes - (points.repeat(block, axis=0) if block else points)) * (
        scales.repeat(block, axis=0) if block else scales
    )
    assert np.allclose(read, expected, atol=1e-6)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for output in model.graph.outputs:
        output.shape = None
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = random.normal(size=(3, K) if rank == 2 else (2, 3, K)).astype(np.float32)
    assert np.allclose(session.run(None, {"x": x})[0], -(x @ read), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_rounded_to_255_steps_of_their_largest(bias, dtype):
    """On ONNX Runtime, against sums of integers by numpy: rows of any size, one of zeros, one with an outlier."""
    import onnxruntime

    random, kind = np.random.default_rng(2), {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}[dtype]
    model = linear_graph(bias, True, output=True)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.type = ir.TensorType(kind)
    if bias:
        model.graph.initializers["b"].const_value = ir.tensor(np.arange(N, dtype=kind.numpy()), name="b")
    quantise(model, {"w": Packing("w8a8", formats.CHANNEL)})
    held = stored(matrix(), Packing("w8a8", formats.CHANNEL), dtype)
    for key, tensor in held.items():
        model.graph.initializers[key].const_value = ir.tensor(tensor.numpy(), name=key)
    x = (random.normal(size=(5, K)) * np.array([[1e-3], [1], [40], [0], [1]])).astype(dtype)
    x[4, 7] = 900
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0].astype(np.float64)
    wide = x.astype(np.float32)
    step = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-30)) * np.float32(1 / 127)
    codes, integers = np.rint(wide / step).astype(np.int64), held["w.w8a8"].numpy().astype(np.int64)
    expected = (codes @ integers) * step.astype(np.float64) * held["w.w8a8_scale"].numpy() + (
        np.arange(N) if bias else 0
    )
    assert np.abs(codes).max() == 127 and not codes[3].any()
    assert np.allclose(
        found, expected, rtol=1e-6 if dtype == "float32" else 2e-3, atol=1e-6 if dtype == "float32" else 1e-3
    )
    exact = wide @ (integers * held["w.w8a8_scale"].numpy().astype(np.float32))
    errors = np.abs(expected - exact - (np.arange(N) if bias else 0)).max(axis=1) / np.maximum(
        np.abs(exact).max(axis=1), 1e-9
    )
    assert 1e-4 < errors[1] < 0.02 < errors[4]  # what rounding costs, and what an outlier does to its row


def test_what_is_no_linear_layer_is_refused_by_name():
    model = linear_graph(False, True)
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)
    with pytest.raises(GraphError, match=r"w is read by Gemm .* cannot read packed weights"):
        quantise(model, {"w": Packing("int8", 32)})
    with pytest.raises(GraphError, match="no matrix v to be stored as int8"):
        quantise(model, {"v": Packing("int8", 32)})


def test_narrow_weights_are_widened_behind_the_rows_that_are_read():
    """A matrix behind its Cast; a table of embeddings behind its Gather."""
    table = val("table", dtype=ir.DataType.FLOAT, shape=ir.Shape([9, 4]))
    ids = val("ids", dtype=ir.DataType.INT64, shape=ir.Shape([2]))
    gather, other = ir.node("Gather", [table, ids]), ir.node("Neg", [table])
    for node in (gather, other):
        node.outputs[0].dtype = ir.DataType.FLOAT
    both = ir.node("MatMul", [gather.outputs[0], other.outputs[0]])
    graph = ir.Graph([ids], both.outputs, nodes=[gather, other, both], initializers=[table], opset_imports={"": 24})
    widen(ir.Model(graph, ir_version=11), {"table": ir.DataType.FLOAT16})
    order = [(node.op_type, node.inputs[0].name if node.inputs[0] is table else None) for node in graph]
    assert order == [("Cast", "table"), ("Gather", "table"), ("Cast", None), ("Neg", None), ("MatMul", None)]
    assert table.dtype == gather.outputs[0].dtype == ir.DataType.FLOAT16
    assert all(value.dtype == ir.DataType.FLOAT for value in (both.inputs[0], other.inputs[0]))


def test_a_graph_that_is_widened_leaves_its_clone_alone():
    table = val("table", dtype=ir.DataType.FLOAT, shape=ir.Shape([9, 4]))
    other = ir.node("Neg", [table])
    model = ir.Model(
        ir.Graph([], other.outputs, nodes=[other], initializers=[table], opset_imports={"": 24}), ir_version=11
    )
    widen(model.clone(), {"table": ir.DataType.FLOAT16})
    assert table.dtype == ir.DataType.FLOAT and [node.op_type for node in model.graph] == ["Neg"]
