"""The pyramid pass on a hand-made decoder against the same decoder in numpy, where tokens are really removed."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden_text import assert_golden
from oracles import decoder as oracle
from toy_decoder import build, weights

from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.lint import lint
from vlmtrim.graphs.methods.pyramid import Pyramid, read_stages
from vlmtrim.graphs.surgery.shard import cut, specs

CAPACITY, LAYERS, VISUAL = 64, 4, 16
STAGES = ((1, 0.5), (2, 0.25), (3, 0.125))
GOLDEN = Path(__file__).parent / "golden" / "pyramid.txt"


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def pruned(stages, score, heads=(4, 2)):
    w = weights(1, LAYERS, *heads)
    return w, Pyramid(stages, score)(build(w, CAPACITY), visual_tokens=VISUAL)


def feeds_of(session, x, visual, lengths, shares):
    """A step behind ``lengths`` entries of each group; caches are empty in the first."""
    tokens, count = len(x), len(visual)
    feeds = {
        "inputs_embeds": x[None].astype(np.float32),
        "position_ids": lengths[0] + np.arange(tokens)[None],
        "last_index": np.array([tokens - 1]),
        "visual_positions": np.array(visual, np.int64).reshape(1, count),
    }
    for group, share in enumerate((1.0, *shares)):
        grown = tokens - count + round(count * share)
        feeds[f"write_indices.{group}"] = np.array([lengths[group]])
        feeds[f"key_positions.{group}"] = np.arange(lengths[group] + grown)
        lengths[group] += grown
    return {value.name: feeds[value.name] for value in session.get_inputs() if value.name in feeds}


@pytest.mark.parametrize("score", ["last-row", "own-row", "no-rope"])
@pytest.mark.parametrize("stages", [STAGES, ((1, 0.75), (3, 0.25)), ((2, 0.4),)])
def test_kept_tokens_and_logits_equal_the_numpy_decoder(score, stages):
    """Two turns with visual tokens at any places, and one without."""
    w, model = pruned(stages, score)
    graph, random = session(model), np.random.default_rng(0)
    caches = {
        value.name: np.zeros((1, *value.shape[1:]), np.float32)
        for value in graph.get_inputs()
        if value.name.startswith("past")
    }
    lengths, position, past = [0] * (len(stages) + 1), 0, [(np.zeros((2, 0, 8)), np.zeros((2, 0, 8)))] * LAYERS
    for tokens, count in ((20, 13), (12, 5), (4, 0)):
        x = random.normal(size=(tokens, 32))
        visual = sorted(random.permutation(tokens - 1)[:count].tolist())
        feeds = feeds_of(graph, x, visual, lengths, [share for _, share in stages])
        names = [value.name for value in graph.get_outputs()]
        found = dict(zip(names, graph.run(None, {**feeds, **caches}), strict=True))
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
        at = position + np.arange(tokens)
        logits, kept, past = oracle.staged(w, x, at, visual, past, dict(stages), score)
        position += tokens
        assert found["kept_indices"][0].tolist() == kept.tolist()
        np.testing.assert_allclose(found["logits"][0], logits, atol=1e-4 * max(1, np.abs(logits).max()))
        for layer, (key, _) in enumerate(past):
            np.testing.assert_allclose(
                caches[f"past_key_values.{layer}.key"][0, :, : key.shape[1]], key, atol=1e-3, rtol=1e-4
            )


def test_what_keeps_all_is_bit_exact_with_the_plain_graph():
    w, model = pruned(((1, 1.0),), "own-row")
    plain, graph = session(build(w, CAPACITY)), session(model)
    x, lengths = np.random.default_rng(1).normal(size=(9, 32)), [0, 0]
    feeds = feeds_of(graph, x, [1, 2, 5], lengths, [1.0])
    caches = {v.name: np.zeros((1, *v.shape[1:]), np.float32) for v in plain.get_inputs() if v.name.startswith("past")}
    ours = {v.name: np.zeros((1, *v.shape[1:]), np.float32) for v in graph.get_inputs() if v.name.startswith("past")}
    whole = {name: value for name, value in feeds.items() if name in [v.name for v in plain.get_inputs()]}
    np.testing.assert_array_equal(
        plain.run(["logits"], {**whole, **caches})[0], graph.run(["logits"], {**feeds, **ours})[0]
    )


@pytest.mark.parametrize("starts", [[2], [3], [2, 3], [1, 2, 3]])
def test_a_chain_is_bit_exact_with_the_whole(starts):
    """What crosses a cut between stages has dims that limits of engines can be given for."""
    _, model = pruned(STAGES, "own-row")
    shards = cut(model, starts)
    named = {"B", "S", "N", *(f"{kind}{group}" for kind in ("W", "Sk", "Nk") for group in range(4)), "Sk"}
    crossing = {str(dim) for spec in specs(shards, "d") for t in spec.inputs for dim in t.shape if isinstance(dim, str)}
    assert crossing <= named and {f"Nk{start - 1}" for start in starts if start > 1} <= crossing
    whole, pieces = session(model), [session(shard) for shard in shards]
    x, lengths = np.random.default_rng(2).normal(size=(20, 32)), [0] * 4
    feeds = feeds_of(whole, x, list(range(1, 14)), lengths, [share for _, share in STAGES])
    feeds |= {v.name: np.zeros((1, *v.shape[1:]), np.float32) for v in whole.get_inputs() if v.name.startswith("past")}
    names = [value.name for value in whole.get_outputs()]
    expected, values = dict(zip(names, whole.run(None, feeds), strict=True)), dict(feeds)
    for piece in pieces:
        inputs = {value.name: values[value.name] for value in piece.get_inputs()}
        values |= dict(zip([v.name for v in piece.get_outputs()], piece.run(None, inputs), strict=True))
    assert len(shards) == len(starts) + 1
    for name, want in expected.items():
        np.testing.assert_array_equal(values[name], want)


def test_the_boundary_is_the_contracts():
    _, model = pruned(STAGES, "own-row")
    groups = Pyramid(STAGES).groups((CacheGroup((0, 1, 2, 3), CAPACITY, 2, 8),), VISUAL)
    assert [group.layers for group in groups] == [(0,), (1,), (2,), (3,)]
    assert [group.capacity for group in groups] == [64, 56, 52, 50]
    assert [group.length(20, 13) for group in groups] == [20, 13, 10, 9]
    lint(model, decoder_spec(dtype="float32", hidden=32, vocabulary=13, groups=groups, selects=True))


def test_stages_of_any_depth():
    assert Pyramid().of(32) == ((8, 0.5), (16, 0.25), (24, 0.125))
    assert Pyramid().of(8) == ((2, 0.5), (4, 0.25), (6, 0.125))
    assert read_stages("8:0.5,16:.25") == ((8, 0.5), (16, 0.25))
    assert Pyramid(((8, 0.5), (16, 0.25)), "no-rope").label == "pyramid-8x0.5-16x0.25-no-rope"


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (((2, 0.5), (1, 0.25)), "each beyond the one before"),
        (((0, 0.5),), "layers of 1 or more"),
        (((1, 0.25), (2, 0.5)), "each below the one before"),
        (((1, 0.0),), "above 0"),
        ((), "layers of 1 or more"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, why):
    with pytest.raises(ValueError, match=why):
        Pyramid(stages)


def test_what_does_not_fit_the_decoder_is_refused():
    with pytest.raises(GraphError, match="a stage begins at layer 4, the decoder has 4"):
        Pyramid(((4, 0.5),))(build(weights(0, LAYERS, 4, 2), CAPACITY))
    with pytest.raises(GraphError, match="2 layers, too few"):
        Pyramid().of(2)
    with pytest.raises(GraphError, match="already selects"):
        Pyramid(STAGES)(FastV(k=1)(build(weights(0, LAYERS, 4, 2), CAPACITY)))
    with pytest.raises(ValueError, match="give last-row, no-rope or own-row"):
        Pyramid(score="stride")


def test_the_graph_is_the_golden_text():
    assert_golden(pruned(STAGES, "own-row")[1].graph, GOLDEN, "select")
