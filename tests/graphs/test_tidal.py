"""The tidal pass on a hand-made decoder against the same decoder in numpy, where entries are masked, not gathered."""

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden_text import assert_golden
from oracles import decoder, tidal
from toy_decoder import build, weights

from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.methods.tidal import Tidal, read_layers
from vlmtrim.graphs.surgery.anatomy import find_layers
from vlmtrim.graphs.surgery.shard import cut, specs

CAPACITY, LAYERS, PROMPT = 64, 6, 20
GOLDEN = Path(__file__).parent / "golden" / "tidal.txt"


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def sparse(w, entries, selecting, capacity=CAPACITY):
    """The decoder with the pass; it also returns what its selecting layers chose, if a layer reads it."""
    model = Tidal(entries, selecting)(build(w, capacity))
    model.graph.outputs.extend(v for node in model.graph for v in node.outputs if v.name.startswith("attended"))
    return session(model)


def no_caches(graph, rows=1):
    return {v.name: np.zeros((rows, *v.shape[1:]), np.float32) for v in graph.get_inputs() if v.name.startswith("past")}


def run(graph, x, past, caches, window=None, counts=None):
    """x [B, S, D] behind ``past`` int [B] -> (outputs by name, caches); ``window`` if wider than it has to be."""
    tokens, past = x.shape[1], np.array(past)
    counts = np.full(len(x), tokens) if counts is None else np.array(counts)
    feeds = {
        "inputs_embeds": x.astype(np.float32),
        "position_ids": past[:, None] + np.arange(tokens),
        "last_index": counts - 1,
        "write_indices.0": past,
        "key_positions.0": np.arange(window or past.max() + tokens),
    }
    outputs = dict(zip([v.name for v in graph.get_outputs()], graph.run(None, {**feeds, **caches}), strict=True))
    return outputs, {name: outputs[name.replace("past_key_values", "present")] for name in caches}


def sets(first, entries):
    """What each key head attends to, of [KV, W] whose first ``entries`` are that."""
    assert (np.sort(first) == np.arange(first.shape[1])).all() and (np.diff(first[:, :entries]) > 0).all()
    return [set(row[:entries].tolist()) for row in first]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("entries", "selecting"), [(5, (1,)), (8, (0, 3)), (1, (2,)), (30, (1, 2)), (12, (0, 1, 4))])
def test_chosen_entries_caches_and_logits_equal_the_numpy_decoder(heads, entries, selecting):
    """A prefill, 16 steps, another turn, 4 steps: windows pass the number of entries on the way where it is 30."""
    w, random = weights(3, LAYERS, *heads), np.random.default_rng(0)
    graph, dim = sparse(w, entries, selecting), heads[0] * 8
    caches, position, past = no_caches(graph), 0, [(np.zeros((heads[1], 0, 8)),) * 2] * LAYERS
    for tokens in [PROMPT, *[1] * 16, 7, *[1] * 4]:
        x = random.normal(size=(tokens, dim))
        found, caches = run(graph, x[None], [position], caches)
        if tokens > 1:
            logits, _, past = decoder.forward(w, x, position + np.arange(tokens), [], past, None, 0)
            chosen = dict.fromkeys(selecting)
        else:
            logits, chosen, past = tidal.step(w, x[0], position, past, entries, selecting)
        position += tokens
        for name in (name for name in found if name.startswith("attended")):
            ours = sets(found[name][0], entries if tokens == 1 else position)
            everything = [set(range(position))] * heads[1]
            assert ours == (chosen[int(name[-1])] or everything) and all(position - 1 in head for head in ours)
        np.testing.assert_allclose(found["logits"][0], logits, atol=1e-4 * max(1, np.abs(logits).max()))
    for layer, (key, value) in enumerate(past):
        for kind, want in (("key", key), ("value", value)):
            have = caches[f"past_key_values.{layer}.{kind}"][0, :, :position]
            np.testing.assert_allclose(have, want, atol=1e-3, rtol=1e-4)


def test_prefills_and_short_windows_are_bit_exact_with_the_plain_graph():
    w, random = weights(1, LAYERS, 4, 2), np.random.default_rng(1)
    plain, graph = session(build(w, CAPACITY)), session(Tidal(22, (1, 3))(build(w, CAPACITY)))
    caches, position = (no_caches(plain), no_caches(plain)), 0
    for tokens in (PROMPT, 1, 1, 5):  # 20 entries, then 21, 22 and 27
        x = random.normal(size=(1, tokens, 32))
        (want, past), (found, ours) = (run(g, x, [position], c) for g, c in zip((plain, graph), caches, strict=True))
        caches, position = (past, ours), position + tokens
        for name, value in want.items():
            np.testing.assert_array_equal(value, found[name])
    x = random.normal(size=(1, 1, 32))
    (want, _), (found, _) = (run(g, x, [position], c) for g, c in zip((plain, graph), caches, strict=True))
    assert (want["logits"] != found["logits"]).any()  # the 28th entry makes some of them left out


def test_rows_of_a_batch_are_as_if_alone_and_wider_windows_change_nothing():
    """9 and 20 tokens, 6 to 14 entries; windows as wide as the caches, as engines get them in buckets."""
    w, random = weights(2, LAYERS, 4, 2), np.random.default_rng(2)
    for entries in (6, 10, 14):
        graph = sparse(w, entries, (1, 3))
        x, steps = random.normal(size=(2, 20, 32)), random.normal(size=(3, 2, 1, 32))
        _, caches = run(graph, x, [0, 0], no_caches(graph, 2), counts=[9, 20])
        alone = [run(graph, x[row : row + 1, :n], [0], no_caches(graph))[1] for row, n in enumerate((9, 20))]
        for number, step in enumerate(steps):
            past = [9 + number, 20 + number]
            found, caches = run(graph, step, past, caches)
            wide, _ = run(graph, step, past, {n: c.copy() for n, c in caches.items()}, window=CAPACITY)
            np.testing.assert_allclose(wide["logits"], found["logits"], atol=1e-4)
            for row in range(2):
                want, alone[row] = run(graph, step[row : row + 1], past[row : row + 1], alone[row])
                np.testing.assert_allclose(found["logits"][row], want["logits"][0], atol=1e-4)
                for layer in (1, 3):
                    name, seen = f"attended_first.{layer}", set(range(past[row] + 1))
                    kinds = (want[name][0], found[name][row], wide[name][row])
                    one, two, three = ([head & seen for head in sets(first, entries)] for first in kinds)
                    assert one == two == three


def test_of_equals_the_lowest_index_stays_and_the_newest_always():
    w = weights(4, LAYERS, 4, 2)
    w["layers"][1]["k"][:] = 0  # its attention is the same to all
    graph = sparse(w, 7, (1,))
    random, dim = np.random.default_rng(3), 32
    _, caches = run(graph, random.normal(size=(1, PROMPT, dim)), [0], no_caches(graph))
    found, _ = run(graph, random.normal(size=(1, 1, dim)), [PROMPT], caches)
    assert sets(found["attended_first.1"][0], 7) == [{0, 1, 2, 3, 4, 5, PROMPT}] * 2


def test_more_entries_than_one_topk_takes():
    """Above TensorRT's limit the best are taken in rounds."""
    w, entries, past = weights(5, 3, 2, 1), 4000, 4500
    graph, random = sparse(w, entries, (0,), capacity=5000), np.random.default_rng(4)
    held = [tuple(random.normal(size=(1, past, 8)).astype(np.float32) for _ in range(2)) for _ in range(3)]
    caches = no_caches(graph)
    for layer, pair in enumerate(held):
        for kind, value in zip(("key", "value"), pair, strict=True):
            caches[f"past_key_values.{layer}.{kind}"][0, :, :past] = value
    x = random.normal(size=16)
    found, _ = run(graph, x[None, None], [past], caches)
    logits, chosen, _ = tidal.step(w, x, past, held, entries, (0,))
    assert sets(found["attended_first.0"][0], entries) == chosen[0] and len(chosen[0][0]) == entries
    np.testing.assert_allclose(found["logits"][0], logits, atol=1e-4)


def test_a_chain_is_bit_exact_with_the_whole():
    w, random = weights(6, LAYERS, 4, 2), np.random.default_rng(5)
    model = Tidal(6, (1, 3))(build(w, CAPACITY))
    shards = cut(model, [2, 4])
    whole, pieces = session(model), [session(shard) for shard in shards]
    assert [t.name for spec in specs(shards, "decoder") for t in spec.inputs if t.name.startswith("attended")] == [
        "attended_first.1",
        "attended_first.3",
    ]
    caches, position = no_caches(whole), 0
    for tokens in (PROMPT, 1, 1):
        x = random.normal(size=(1, tokens, 32))
        values = {
            "inputs_embeds": x.astype(np.float32),
            "position_ids": position + np.arange(tokens)[None],
            "last_index": np.array([tokens - 1]),
            "write_indices.0": np.array([position]),
            "key_positions.0": np.arange(position + tokens),
            **caches,
        }
        found, caches = run(whole, x, [position], caches)
        for piece in pieces:
            inputs = {value.name: values[value.name] for value in piece.get_inputs()}
            values |= dict(zip([v.name for v in piece.get_outputs()], piece.run(None, inputs), strict=True))
        for name, want in found.items():
            np.testing.assert_array_equal(values[name], want)
        position += tokens


def test_the_graph_of_the_choice_is_the_golden_text():
    assert_golden(Tidal(9, (1,))(build(weights(0, 4, 4, 2), CAPACITY)).graph, GOLDEN, "tidal/")


def test_layers_that_read_chosen_entries_copy_no_window():
    """Their keys and values are gathered from the caches; what cut the window is gone."""
    model = Tidal(8, (1,))(build(weights(0, 4, 4, 2), CAPACITY))
    producers = [layer.key.producer().op_type for layer in find_layers(model)]
    assert producers == ["Slice", "Slice", "GatherND", "GatherND"]
    assert sum(node.op_type == "Slice" and "present" in node.inputs[0].name for node in model.graph) == 4


@pytest.mark.parametrize(("depth", "layers"), [(32, (2, 13)), (24, (2, 10)), (8, (2, 3)), (4, (2,))])
def test_by_default_layer_2_and_one_at_two_fifths_choose(depth, layers):
    assert Tidal().of(depth) == layers


def test_caches_stay_whole_and_a_step_reads_less_of_them():
    (group,) = Tidal(30).groups((CacheGroup((0, 1, 2, 3, 4, 5, 6, 7), 100, 2, 8),), 40)
    assert group.capacity == 100 and group.length(30, 20) == 30 and group.sparse == (4, 5, 6, 7)
    assert group.nbytes(1, "float32") == 8 * 100 * 2 * 2 * 8 * 4
    assert group.read_bytes(90, "float32") == (4 * 90 + 4 * 30) * 2 * 2 * 8 * 4
    assert group.read_bytes(20, "float32") == 8 * 20 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"entries": 0}, "entries is 0"),
        ({"entries": 0.5}, "entries is 0.5"),
        ({"selecting": ()}, r"selecting is \(\)"),
        ({"selecting": (3, 2)}, r"selecting is \(3, 2\)"),
        ({"selecting": (2, 2)}, r"selecting is \(2, 2\)"),
        ({"selecting": (-1,)}, r"selecting is \(-1,\)"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        Tidal(**fields)


def test_lists_of_layers_are_read_and_others_refused():
    assert read_layers("2,13") == (2, 13)
    for text in ("", "2,", "a", "-1", "2 3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no list of layers"):
            read_layers(text)


def test_decoders_that_it_does_not_fit_are_refused():
    w = weights(0, 4, 4, 2)
    dense = CacheGroup((0, 1, 2, 3), 64, 2, 8)
    with pytest.raises(GraphError, match="at most 64 entries"):
        Tidal(64).groups((dense,), 0)
    with pytest.raises(GraphError, match=r"layer 3 would choose .* the decoder has 4 layers: give --selecting 0 to 2"):
        Tidal(8, (3,)).groups((dense,), 0)
    with pytest.raises(GraphError, match="2 cache groups"):
        Tidal(8).groups((dense, dense), 0)
    with pytest.raises(GraphError, match="at most 64 entries, a layer is to attend to 64"):
        Tidal(64)(build(w, CAPACITY))
    with pytest.raises(GraphError, match="attends to chosen entries already"):
        Tidal(8)(Tidal(8)(build(w, CAPACITY)))
    with pytest.raises(GraphError):
        Tidal(8)(FastV(k=1)(build(w, CAPACITY), visual_tokens=8))
