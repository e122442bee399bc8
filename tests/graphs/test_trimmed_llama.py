"""Trimmed-Llama's selection alone, scores given: ONNX Runtime and onnx's evaluator against plain Python; refusals."""

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from oracles.trimmed import kept_by_union
from toy_decoder import build, weights

from vlmtrim.graphs.contract import IMAGES, CacheGroup, most_features
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.methods.trimmed_llama import TrimmedLlama, Union
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery import select
from vlmtrim.graphs.surgery.select import kept_first

MOST = 40
GOLDEN = Path(__file__).parent / "golden" / "trimmed-llama.txt"
SETTINGS = [(0.25, 0.875), (0.25, 0.25), (0.5, 1.0), (0.03, 0.1), (1.0, 1.0)]


def selection(heads, ratio, most):
    """scores [B, H, N], image_numbers [B, N] -> 0/1 [B, N], indices with the kept ones first [B, N]."""
    scores = ir.val("scores", dtype=ir.DataType.FLOAT, shape=("B", heads, "N"))
    numbers = ir.val("image_numbers", dtype=ir.DataType.INT64, shape=("B", "N"))
    ops = Ops("trim")
    keep = Union(ops, heads, ratio, most, MOST).keep(scores, numbers)
    order = kept_first(ops, keep, ops.dim(numbers, 1), ops("ReduceSum", keep, ops.const([1]), keepdims=1))
    for value in (keep, order):
        value.type = ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph([scores, numbers], [keep, order], nodes=ops.nodes, opset_imports={"": 24}, name="union")
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def runners():
    cache = {}

    def get(heads, ratio, most, limit=select.TOPK_LIMIT):
        key = (heads, ratio, most, limit)
        if key not in cache:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(select, "TOPK_LIMIT", limit)
                proto = ir.to_proto(selection(heads, ratio, most))
            session, reference = ort.InferenceSession(proto.SerializeToString()), ReferenceEvaluator(proto)
            cache[key] = [lambda feeds: session.run(None, feeds), lambda feeds: reference.run(None, feeds)]
        return cache[key]

    return get


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_union_is_what_plain_python_says(runners, data):
    """Any rows, heads, filling and ties; kept ones come first, in order."""
    heads = data.draw(st.sampled_from([1, 4]))
    ratio, most = data.draw(st.sampled_from(SETTINGS))
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, MOST))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = data.draw(st.sampled_from([3, 1000]))  # few levels make ties
    scores = (random.integers(0, levels, (rows, heads, count)) / levels).astype(np.float32)
    numbers = random.integers(-1, 3, (rows, count))
    limit = data.draw(st.sampled_from([select.TOPK_LIMIT, 7]))  # TopK in one round, or in several
    onnxruntime, reference = runners(heads, ratio, most, limit)
    small = heads * count <= 16  # onnx's evaluator gathers with numpy.choose, which takes few choices
    for run in (onnxruntime, reference) if small else (onnxruntime,):
        keep, order = run({"scores": scores, "image_numbers": numbers})
        for row in range(rows):
            expected = kept_by_union(scores[row], numbers[row], ratio, most)
            assert np.flatnonzero(keep[row]).tolist() == expected
            assert order[row, : len(expected)].tolist() == expected


def test_a_step_without_pictures_keeps_nothing(runners):
    feeds = {"scores": np.zeros((2, 4, 0), np.float32), "image_numbers": np.zeros((2, 0), np.int64)}
    keep, order = runners(4, 0.25, 0.875)[0](feeds)
    assert keep.shape == order.shape == (2, 0)


def test_the_selection_is_the_golden_one():
    lines = []
    for node in selection(4, 0.25, 0.875).graph:
        inputs = ", ".join(str(v.name) for v in node.inputs if v is not None)
        named = {key: attribute.value for key, attribute in node.attributes.items() if key != "value"}
        outputs = ", ".join(str(v.name) for v in node.outputs)
        lines.append(f"{outputs} = {node.op_type}({inputs})" + (f" {named}" if named else ""))
    text = "\n".join(lines) + "\n"
    if os.environ.get("REGENERATE"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_the_caches_shrink_to_the_bound():
    dense = (CacheGroup((0, 2), 100, 2, 8), CacheGroup((1, 3), 80, 2, 8, source=IMAGES))
    tokens, images = TrimmedLlama(ratio=0.1).groups(dense, 80)
    assert tokens == dense[0] and images.capacity == most_features(80, 0.35) == 28 == images.length(5, 80)
    assert TrimmedLlama(ratio=0.1, bound=0.2).groups(dense, 80)[1].capacity == 16


@pytest.mark.parametrize("fields", [{"ratio": 0}, {"ratio": 1.1}, {"ratio": 0.5, "bound": 0.4}, {"bound": 1.5}])
def test_parameters_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="give the share"):
        TrimmedLlama(**fields)


def test_more_places_than_float32_counts_are_refused():
    ops, numbers = Ops("trim"), ir.val("n", dtype=ir.DataType.INT64, shape=("B", "N"))
    with pytest.raises(GraphError, match="more places"):
        Union(ops, 64, 1.0, 1.0, 2**18).keep(ir.val("s", dtype=ir.DataType.FLOAT, shape=("B", 64, "N")), numbers)


def test_a_decoder_without_cross_attention_is_refused():
    with pytest.raises(GraphError, match="0 cross-attention layers"):
        TrimmedLlama()(build(weights(0, 3, 2, 2), 16))
