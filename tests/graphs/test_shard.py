"""A decoder cut into pieces says exactly what it says in one piece."""

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from toy_decoder import build, weights

from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.lint import boundary, lint_chain
from vlmtrim.graphs.surgery.shard import boundaries, cut, specs

CAPACITY, LAYERS, HEADS, HIDDEN = 48, 5, (4, 2), 32


def decoder(k, score="last-row"):
    model = build(weights(1, LAYERS, *HEADS), CAPACITY)
    return model if k is None else FastV(k=k, r=0.5, score=score)(model, visual_tokens=8)


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def serialised(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def feeds_of_turn(inputs, random, caches, lengths, position, tokens, visual):
    survivors = tokens - visual // 2
    groups = [tokens, survivors] if "write_indices.1" in inputs else [survivors]
    feeds = {
        "inputs_embeds": random.normal(size=(1, tokens, HIDDEN)).astype(np.float32),
        "position_ids": position + np.arange(tokens)[None],
        "last_index": np.array([tokens - 1]),
        "visual_positions": np.arange(1, 1 + visual)[None],
        **caches,
    }
    for group, grown in enumerate(groups):
        feeds[f"write_indices.{group}"] = np.array([lengths[group]])
        feeds[f"key_positions.{group}"] = np.arange(lengths[group] + grown)
        lengths[group] += grown
    return {name: value for name, value in feeds.items() if name in inputs}


@pytest.mark.parametrize("k", [None, 0, 1, 2, 4])
@pytest.mark.parametrize("starts", [[1], [2], [4], [1, 2, 3, 4], [2, 3]])
def test_a_chain_is_bit_exact_with_the_whole(k, starts):
    """Two turns and a decode step; cuts before, at and behind the selection."""
    model = decoder(k)
    shards = cut(model, starts)
    whole_spec = GraphSpec("decoder.onnx", *boundary(model))
    lint_chain(specs(shards, "decoder"), whole_spec)
    whole, chain = session(model), [session(shard) for shard in shards]
    inputs = {value.name: value.shape for value in whole.get_inputs()}
    names = [value.name for value in whole.get_outputs()]
    random, lengths, position = np.random.default_rng(0), [0, 0], 0
    caches = {n: np.zeros((1, *shape[1:]), np.float32) for n, shape in inputs.items() if n.startswith("past")}
    for tokens, visual in ((10, 6), (7, 2), (1, 0)):
        feeds = feeds_of_turn(inputs, random, caches, lengths, position, tokens, 0 if k is None else visual)
        position += tokens
        expected = dict(zip(names, whole.run(None, feeds), strict=True))
        known = dict(feeds)
        for graph in chain:
            outputs = graph.run(None, {value.name: known[value.name] for value in graph.get_inputs()})
            known |= dict(zip([value.name for value in graph.get_outputs()], outputs, strict=True))
        for name in names:
            np.testing.assert_array_equal(known[name], expected[name], err_msg=name)
        caches = {name: expected[name.replace("past_key_values", "present")] for name in caches}


def test_only_small_values_cross_besides_the_hidden_states():
    shards = cut(decoder(2), [2, 3])
    crossing = {t.name: t.shape for t in specs(shards, "decoder")[1].inputs if "past" not in t.name}
    assert sorted(crossing.values()) == [("B",), ("B", "Sk"), ("B", "Sk", HIDDEN), ("W1",)]
    assert {"hidden_states.2", "write_indices.1", "key_positions.1"} < set(crossing)


def test_the_model_is_left_alone_and_the_pieces_are_always_the_same():
    model = decoder(2)
    before = serialised(model)
    first, second = cut(model, [1, 3]), cut(decoder(2), [1, 3])
    assert serialised(model) == before
    assert [serialised(shard) for shard in first] == [serialised(shard) for shard in second]


def test_every_layer_and_weight_is_in_one_piece():
    shards = cut(decoder(2), [1, 3])
    assert [sum(node.op_type == "Attention" for node in shard.graph) for shard in shards] == [1, 2, 2]
    assert sum("logits" in [v.name for v in shard.graph.outputs] for shard in shards) == 1


@pytest.mark.parametrize("tail", [0, 0.7, 3])
def test_boundaries_make_the_largest_piece_as_small_as_can_be(tail):
    for layers, shards in itertools.product(range(1, 9), range(1, 9)):
        if shards > layers:
            continue

        def largest(starts, layers=layers):
            edges = [0, *starts, layers]
            sizes = [b - a for a, b in itertools.pairwise(edges)]
            return max([*sizes[:-1], sizes[-1] + tail])

        found = boundaries(layers, shards, tail)
        assert len(found) == shards - 1 and [0, *found, layers] == sorted({0, *found, layers})
        best = min(largest(starts) for starts in itertools.combinations(range(1, layers), shards - 1))
        assert largest(found) == best, (layers, shards)


@pytest.mark.parametrize("shards", [0, 6])
def test_more_pieces_than_layers_are_refused(shards):
    with pytest.raises(GraphError, match="give 1 to 5"):
        boundaries(5, shards)


def test_a_chain_that_lacks_a_tensor_is_refused():
    model = decoder(2)
    whole = GraphSpec("decoder.onnx", *boundary(model))
    chain = specs(cut(model, [3]), "decoder")
    with pytest.raises(GraphError, match="provides"):
        lint_chain(chain[1:], whole)
    with pytest.raises(GraphError, match="no graph of the chain returns"):
        lint_chain(chain[:1], whole)
    with pytest.raises(GraphError, match="returned by two graphs"):
        lint_chain([chain[0], *chain], whole)
