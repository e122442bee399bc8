"""The last layer on one row: the same logits and caches, by a graph whose last matrices see one token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import toy_decoder

from vlmtrim.graphs import FastV
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.passes.last_row import last_row
from vlmtrim.graphs.surgery.anatomy import find_layers

WEIGHTS = toy_decoder.weights(3, layers=3, heads=4, kv=2)
HIDDEN, CAPACITY = 32, 40


def session(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def feeds(graph: ort.InferenceSession, caches: dict, start: np.ndarray, lengths: list[int], visual: list) -> dict:
    """One step of two rows from entry ``start`` of every group on; padded on the right."""
    tokens, random = max(lengths), np.random.default_rng(sum(lengths))
    given = {
        "inputs_embeds": random.normal(size=(2, tokens, HIDDEN)).astype(np.float32),
        "position_ids": start[:, None] + np.arange(tokens),
        "last_index": np.array(lengths) - 1,
        "visual_positions": np.array(visual, np.int64).reshape(2, -1),
        **caches,
    }
    for value in graph.get_inputs():
        if value.name.startswith("write_indices"):
            given[value.name] = start
        if value.name.startswith("key_positions"):
            given[value.name] = np.arange(start.max() + tokens)
        if value.name not in given:
            given[value.name] = np.zeros([2, *value.shape[1:]], np.float32)
    return {value.name: given[value.name] for value in graph.get_inputs()}


@pytest.mark.parametrize("method", [None, FastV(k=1, r=0.5), FastV(k=2, r=0.5), FastV(k=0, r=0.75)])
def test_logits_and_caches_stay_in_prefill_and_decode(method):
    """Against the graph without the pass, rows of different length, three steps on the same caches."""
    graphs = []
    for rewrite in (lambda model: model, last_row):
        model = rewrite(toy_decoder.build(WEIGHTS, CAPACITY))
        graphs.append(session(model if method is None else method(model)))
    caches: dict = {}
    start = np.zeros(2, np.int64)
    for lengths, visual in (([9, 7], [[0, 2, 3, 4], [1, 2, 3, 5]]), ([1, 1], [[], []]), ([4, 5], [[0, 1], [1, 2]])):
        both = []
        for graph in graphs:
            given = feeds(graph, caches, start, lengths, visual)
            names = [value.name for value in graph.get_outputs()]
            both.append(dict(zip(names, graph.run(None, given), strict=True)))
        plain, rewritten = both
        assert plain.keys() == rewritten.keys()
        for name, value in plain.items():
            np.testing.assert_allclose(rewritten[name], value, rtol=0, atol=2e-5, err_msg=name)
        caches = {name.replace("present", "past_key_values"): v for name, v in plain.items() if "present" in name}
        start = start + np.array(lengths)


def test_in_the_last_layer_keys_and_values_alone_see_every_token():
    """Counted in a run: rows of what every MatMul returns."""
    rows = {}
    for name, rewrite in (("plain", lambda model: model), ("rewritten", last_row)):
        model = rewrite(toy_decoder.build(WEIGHTS, CAPACITY))
        last = find_layers(model)[-1]
        products = [node.outputs[0] for node in model.graph if node.op_type == "MatMul"]
        behind = products[5 * (len(WEIGHTS["layers"]) - 1) : -1]  # five matrices a layer; the last one is the head
        for value in behind:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.extend(behind)
        graph = session(model)
        found = graph.run([value.name for value in behind], feeds(graph, {}, np.zeros(2, np.int64), [6, 6], [[], []]))
        rows[name] = sorted(value.shape[1] for value in found)
        assert last.query.shape[2] == (1 if name == "rewritten" else "S")
    assert rows == {"plain": [6] * 5, "rewritten": [1, 1, 1, 6, 6]}


def test_a_decoder_that_picks_no_row_is_refused():
    model = toy_decoder.build(WEIGHTS, CAPACITY)
    pick = next(node for node in model.graph if node.op_type == "GatherND")
    mean = ir.node("ReduceMean", [pick.inputs[0], None], attributes={"keepdims": 0, "axes": [1]}, num_outputs=1)
    model.graph.insert_after(pick, mean)
    pick.outputs[0].replace_all_uses_with(mean.outputs[0])
    model.graph.remove(pick, safe=True)
    with pytest.raises(GraphError, match="takes last_index behind the last layer; found: none"):
        last_row(model)
