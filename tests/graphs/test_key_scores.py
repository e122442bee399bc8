"""key_scores on a hand-made decoder: boundary, sums row by row, refusals; against PyTorch in export/test_guided.py."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from toy_decoder import build, weights

from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.lint import lint
from vlmtrim.graphs.passes.key_scores import key_scores
from vlmtrim.graphs.passes.last_row import last_row

CAPACITY, LAYERS, TOKENS = 24, 3, 10


def run(model, rows, counted):
    feeds = {
        "inputs_embeds": np.random.default_rng(0).normal(size=(2, TOKENS, 32)).astype(np.float32),
        "position_ids": np.tile(np.arange(TOKENS), (2, 1)),
        "last_index": np.array([TOKENS - 1, TOKENS - 3]),
        "score_rows": np.array(rows, np.int64).reshape(2, -1),
        "score_weights": np.array(counted, np.float32).reshape(2, -1),
        "write_indices.0": np.zeros(2, np.int64),
        "key_positions.0": np.arange(TOKENS),
    }
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    for wanted in graph.get_inputs():
        if wanted.name.startswith("past_key_values"):
            feeds[wanted.name] = np.zeros((2, *wanted.shape[1:]), np.float32)
    return graph.run(["logits", "key_scores"], feeds)


@pytest.fixture(scope="module")
def watched():
    return key_scores(last_row(build(weights(1, LAYERS, 4, 2), CAPACITY)))


def test_boundary_is_what_the_contract_promises(watched):
    groups = (CacheGroup(tuple(range(LAYERS)), CAPACITY, 2, 8),)
    lint(watched, decoder_spec(dtype="float32", hidden=32, vocabulary=13, groups=groups, selects=False, emits=True))
    onnx.checker.check_model(ir.to_proto(watched), full_check=True)


def test_rows_add_up_by_their_weights_and_see_no_later_token(watched):
    """Each row gives a probability a layer and head; in every layer, the last one too, rows not told give nothing."""
    logits, both = run(watched, [[7, 4], [7, 2]], [[1, 2], [1, 0]])
    _, first = run(watched, [[7], [7]], [[1], [1]])
    _, second = run(watched, [[4], [2]], [[1], [1]])
    np.testing.assert_allclose(both[0], first[0] + 2 * second[0], rtol=1e-5)
    np.testing.assert_allclose(both[1], first[1], rtol=1e-5)
    np.testing.assert_allclose(first.sum(axis=1), LAYERS * 4, rtol=1e-5)
    assert (first[:, :8] > 0).all() and not first[:, 8:].any() and not second[0, 5:].any()
    plain, none = run(watched, [[], []], [[], []])
    np.testing.assert_array_equal(plain, logits)
    assert none.shape == (2, TOKENS) and not none.any()


def test_what_removes_tokens_or_has_one_layer_alone_is_refused():
    with pytest.raises(GraphError, match="the decoder selects visual tokens"):
        key_scores(FastV(k=1, r=0.5)(build(weights(0, LAYERS, 4, 2), CAPACITY), visual_tokens=8))
    with pytest.raises(GraphError, match="one layer, which runs on the last token alone"):
        key_scores(last_row(build(weights(0, 1, 4, 2), CAPACITY)))
