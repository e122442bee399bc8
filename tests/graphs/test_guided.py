"""guided on a hand-made decoder: its ranking is what it is given, all else is FastV, which has a numpy oracle."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from toy_decoder import build, weights

from vlmtrim.graphs import FastV
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup, kept_count
from vlmtrim.graphs.lint import lint, lint_chain
from vlmtrim.graphs.methods.guided import Guided
from vlmtrim.graphs.surgery import shard

CAPACITY, LAYERS, VISUAL = 48, 3, 12


def spec(k, r):
    groups = [CacheGroup(tuple(range(k)), CAPACITY, 2, 8)] if k else []
    groups.append(CacheGroup(tuple(range(k, LAYERS)), CAPACITY - VISUAL + kept_count(VISUAL, r), 2, 8, r))
    return decoder_spec(dtype="float32", hidden=32, vocabulary=13, groups=tuple(groups), selects=True, guided=True)


def run(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    graph = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feeds = dict(feeds)
    for wanted in graph.get_inputs():
        if wanted.name.startswith("past_key_values"):
            feeds[wanted.name] = np.zeros((2, *wanted.shape[1:]), np.float32)
    names = [output.name for output in graph.get_outputs()]
    known = {wanted.name for wanted in graph.get_inputs()}
    return dict(zip(names, graph.run(None, {n: v for n, v in feeds.items() if n in known}), strict=True))


def step(r, tokens=20):
    """Two rows, the visual tokens at other places in each."""
    random = np.random.default_rng(0)
    visual = np.stack([np.arange(1, 13), np.arange(4, 16)])
    return {
        "inputs_embeds": random.normal(size=(2, tokens, 32)).astype(np.float32),
        "position_ids": np.tile(np.arange(tokens), (2, 1)),
        "last_index": np.array([19, 17]),
        "visual_positions": visual,
        "write_indices.0": np.zeros(2, np.int64),
        "key_positions.0": np.arange(tokens),
        "write_indices.1": np.zeros(2, np.int64),
        "key_positions.1": np.arange(tokens - VISUAL + kept_count(VISUAL, r)),
    }


@pytest.mark.parametrize(("k", "r"), [(0, 0.75), (1, 0.5), (2, 0.75), (2, 0.3)])
def test_boundary_is_what_the_contract_promises(k, r):
    model = Guided(k=k, r=r)(build(weights(0, LAYERS, 4, 2), CAPACITY), visual_tokens=VISUAL)
    lint(model, spec(k, r))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("r", [0.3, 0.75])
def test_the_scores_of_fastv_give_fastv_to_the_bit_and_others_give_others(r):
    w, feeds = weights(1, LAYERS, 4, 2), step(r)
    expected = run(FastV(k=2, r=r)(build(w, CAPACITY), visual_tokens=VISUAL), feeds)
    guided = Guided(k=2, r=r)(build(w, CAPACITY), visual_tokens=VISUAL)
    found = run(guided, {**feeds, "guide_scores": expected["visual_scores"]})
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    falling = np.tile(-np.arange(VISUAL, dtype=np.float32), (2, 1))
    kept = run(guided, {**feeds, "guide_scores": falling})["kept_indices"]
    first = kept_count(VISUAL, r)
    assert kept[0].tolist() == [0, *range(1, 1 + first), *range(13, 20)]
    assert kept[1].tolist() == [*range(4), *range(4, 4 + first), *range(16, 20)]


@pytest.mark.parametrize("starts", [[1], [1, 2]])
def test_a_chain_takes_the_scores_where_it_selects(starts):
    r = 0.75
    model = Guided(k=2, r=r)(build(weights(1, LAYERS, 4, 2), CAPACITY), visual_tokens=VISUAL)
    lint_chain(shard.specs(shard.cut(model, starts), "decoder"), spec(2, r))


@pytest.mark.parametrize(("flags", "says"), [({"k": -1}, "k is -1"), ({"r": 1.0}, "r is 1.0")])
def test_flags_out_of_range_are_refused(flags, says):
    with pytest.raises(ValueError, match=says):
        Guided(**flags)
