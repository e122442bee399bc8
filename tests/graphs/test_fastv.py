"""The FastV pass on a hand-made decoder against the same decoder in numpy, where tokens are really removed."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import decoder as oracle
from toy_decoder import build, weights

from vlmtrim.graphs import FastV, GraphError, load, save
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup, kept_count
from vlmtrim.graphs.lint import lint

CAPACITY, LAYERS, VISUAL = 64, 3, 16
HEADS = [(2, 2), (4, 2), (4, 1)]


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3  # caches are copied here on purpose: input and output arrays are kept apart
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


@pytest.fixture(scope="module")
def sessions():
    cache = {}

    def get(heads, k, r, score="last-row"):
        key = (heads, k, r, score)
        if key not in cache:
            w = weights(1, LAYERS, *heads)
            model = build(w, CAPACITY)
            if k is not None:
                FastV(k=k, r=r, score=score)(model, visual_tokens=VISUAL)
            cache[key] = w, session(model)
        return cache[key]

    return get


class Runner:
    """Feeds a pruned or plain graph turn by turn, rows padded on the right, caches kept in numpy."""

    def __init__(self, graph, rows, k, r):
        self.graph, self.k, self.r = graph, k, r
        self.caches = {
            i.name: np.zeros((rows, *i.shape[1:]), np.float32)
            for i in graph.get_inputs()
            if i.name.startswith("past_key_values")
        }
        self.groups = sum(i.name.startswith("write_indices") for i in graph.get_inputs())
        self.lengths = np.zeros((self.groups, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)

    def __call__(self, rows, visual):
        tokens, count = max(map(len, rows)), len(visual[0])
        lengths = np.array([len(row) for row in rows])
        embeds = np.stack([np.pad(row, ((0, tokens - len(row)), (0, 0)), constant_values=9.0) for row in rows])
        feeds = {
            "inputs_embeds": embeds.astype(np.float32),
            "position_ids": self.positions[:, None] + np.arange(tokens),
            "last_index": lengths - 1,
            **self.caches,
        }
        if self.k is not None:
            feeds["visual_positions"] = np.array(visual, np.int64).reshape(len(rows), count)
        removed = 0 if self.k is None else count - round(count * (1 - self.r))
        grown = []
        for g in range(self.groups):
            gone = removed if g == self.groups - 1 else 0
            feeds[f"write_indices.{g}"] = self.lengths[g]
            feeds[f"key_positions.{g}"] = np.arange(self.lengths[g].max() + tokens - gone)
            grown.append(lengths - gone)
        outputs = dict(zip([o.name for o in self.graph.get_outputs()], self.graph.run(None, feeds), strict=True))
        self.lengths, self.positions = self.lengths + np.array(grown), self.positions + lengths
        self.caches = {n: outputs[n.replace("past_key_values", "present")] for n in self.caches}
        return outputs

    def cache(self, layer, row):
        group = self.groups - 1 if self.k is not None and layer >= self.k else 0
        n = self.lengths[group][row]
        return [self.caches[f"past_key_values.{layer}.{kind}"][row, :, :n] for kind in ("key", "value")]


@st.composite
def conversations(draw):
    """Turns of a batch: per turn the rows' lengths, and the same number of visual tokens at any places."""
    rows, turns = draw(st.integers(1, 3)), []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 8))
        lengths = [count + draw(st.integers(1, 6)) for _ in range(rows)]
        visual = [sorted(draw(st.permutations(range(n - 1)))[:count]) for n in lengths]
        turns.append((lengths, visual))
    return turns


def close(have, want):
    """float32 against float64, relative to the largest magnitude."""
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max(initial=0.0)))


@settings(max_examples=120, deadline=None)
@given(
    turns=conversations(),
    heads=st.sampled_from(HEADS),
    k=st.integers(1, LAYERS - 1),
    r=st.sampled_from([0, 0.25, 0.5, 0.75, 0.9]),
    seed=st.integers(0, 5),
    score=st.sampled_from(["last-row", "no-rope"]),
)
def test_kept_tokens_logits_and_caches_equal_the_numpy_decoder(sessions, turns, heads, k, r, seed, score):
    w, graph = sessions(heads, k, r, score)
    random, hidden = np.random.default_rng(seed), w["head"].shape[0]
    rows = len(turns[0][0])
    runner = Runner(graph, rows, k, r)
    kv, dh = heads[1], w["sizes"][2]
    pasts = [[(np.zeros((kv, 0, dh)), np.zeros((kv, 0, dh)))] * LAYERS for _ in range(rows)]
    positions = [0] * rows
    for lengths, visual in turns:
        inputs = [random.normal(size=(n, hidden)).astype(np.float32) for n in lengths]
        outputs = runner(inputs, visual)
        for row, x in enumerate(inputs):
            at = positions[row] + np.arange(len(x))
            logits, kept, pasts[row] = oracle.forward(w, x.astype(np.float64), at, visual[row], pasts[row], k, r, score)
            positions[row] += len(x)
            found = outputs["kept_indices"][row]
            assert found[found < len(x)].tolist() == kept.tolist()
            close(outputs["logits"][row], logits)
            for layer in range(LAYERS):
                for have, want in zip(runner.cache(layer, row), pasts[row][layer], strict=True):
                    close(have, want)


@pytest.mark.parametrize(("k", "r"), [(0, 0.0), (1, 0.0), (2, 0.0), (0, 0.5), (1, 0.5), (2, 0.9)])
def test_nothing_removed_is_bit_exact_with_the_plain_graph(sessions, k, r):
    """r = 0 with visual tokens, and any r without visual tokens."""
    w, plain = sessions((4, 2), None, 0)
    _, pruned = sessions((4, 2), k, r)
    x = np.random.default_rng(3).normal(size=(9, w["head"].shape[0])).astype(np.float32)
    visual = [[1, 2, 3, 5]] if r == 0 else [[]]
    want, have = Runner(plain, 1, None, 0), Runner(pruned, 1, k, r)
    for inputs in ([x], [x[:1]]):
        expected, found = want(inputs, visual), have(inputs, visual)
        np.testing.assert_array_equal(found["logits"], expected["logits"])
        for layer in range(LAYERS):
            for a, b in zip(have.cache(layer, 0), want.cache(layer, 0), strict=True):
                np.testing.assert_array_equal(a, b)
        visual = [[]]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_boundary_is_what_the_contract_promises(k):
    w = weights(0, LAYERS, 4, 2)
    model = FastV(k=k, r=0.75)(build(w, CAPACITY), visual_tokens=VISUAL)
    smaller = CAPACITY - VISUAL + kept_count(VISUAL, 0.75)
    groups = [CacheGroup(tuple(range(k)), CAPACITY, 2, 8)] if k else []
    groups.append(CacheGroup(tuple(range(k, LAYERS)), smaller, 2, 8, 0.75))
    spec = decoder_spec(dtype="float32", hidden=32, vocabulary=13, groups=tuple(groups), selects=True)
    lint(model, spec)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_names_inside_the_graph_do_not_matter(sessions):
    """The pass works on dataflow: renaming every inner value and node changes nothing."""
    w, _ = sessions((4, 2), 2, 0.5)
    renamed = build(w, CAPACITY)
    kept = {*renamed.graph.inputs, *renamed.graph.outputs}
    for index, node in enumerate(reversed(list(renamed.graph))):
        node.name = f"x{index}"
        for value in node.outputs:
            if value not in kept:
                value.name = f"y{index}_{value.index()}"
    pruned = FastV(k=2, r=0.5)(renamed, visual_tokens=VISUAL)
    ordinary = FastV(k=2, r=0.5)(build(w, CAPACITY), visual_tokens=VISUAL)
    assert [n.op_type for n in pruned.graph] == [n.op_type for n in ordinary.graph]
    x = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
    results = [Runner(session(m), 1, 2, 0.5)([x], [list(range(2, 10))]) for m in (pruned, ordinary)]
    for name in results[0]:
        np.testing.assert_array_equal(results[0][name], results[1][name])


def test_no_rope_names_the_operator_that_is_missing():
    model = build(weights(0, LAYERS, 4, 2), CAPACITY)
    for node in list(model.graph):
        if node.op_type == "RotaryEmbedding":
            node.op_type = "Identity"
    with pytest.raises(GraphError, match="query of attention 1 comes from Identity, not from a RotaryEmbedding"):
        FastV(k=2, r=0.5, score="no-rope")(model)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"score": "best"}, "score is 'best': give one of cdpruner, cells, coverage"),
        ({"k": 0, "score": "coverage"}, "k is 0"),
    ],
)
def test_scores_that_cannot_be_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        FastV(**fields)


def test_load_prune_save(tmp_path):
    save(build(weights(0, LAYERS, 4, 2), CAPACITY), tmp_path / "decoder.onnx")
    save(FastV(k=2, r=0.5)(load(tmp_path / "decoder.onnx")), tmp_path / "pruned.onnx")
    names = [i.name for i in ort.InferenceSession(tmp_path / "pruned.onnx").get_inputs()]
    assert "visual_positions" in names and "write_indices.1" in names


def test_later_layers_run_on_fewer_tokens():
    """Attention of layers before k sees S tokens, of the later ones what survives."""
    w = weights(0, LAYERS, 4, 2)
    model = FastV(k=2, r=0.5)(build(w, CAPACITY))
    attention = [n.outputs[0] for n in model.graph if n.op_type == "Attention"]
    for value in attention:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(attention)
    x = np.zeros((12, 32), np.float32)
    outputs = Runner(session(model), 1, 2, 0.5)([x], [list(range(1, 9))])
    assert [outputs[v.name].shape[2] for v in attention] == [12, 12, 8]


def test_a_graph_saved_without_inner_shapes_is_understood():
    model = build(weights(0, LAYERS, 4, 2), CAPACITY)
    for node in model.graph:
        if node.op_type != "TensorScatter":
            for value in node.outputs:
                value.shape = value.shape if value.is_graph_output() else None
    FastV(k=2)(model)
    assert any(v.name == "kept_indices" for v in model.graph.outputs)


def broken(change):
    model = build(weights(0, LAYERS, 2, 2), CAPACITY)
    change(model)
    return model


def drop_mask(model):
    for node in model.graph:
        if node.op_type == "Attention":
            node.resize_inputs(3)


def side_network(model):
    """A value computed from token contents outside the layers and read by every layer."""
    embeds = model.graph.inputs[0]
    extra = ir.node("Tanh", [embeds], name="per_layer_embedding")
    extra.outputs[0].name = "side"
    attention = [n for n in model.graph if n.op_type == "Attention"][-1]
    target = next(n for n in model.graph if n.op_type == "Tanh" and n in attention.outputs[0].uses()[0].node.graph)
    add = ir.node("Add", [target.inputs[0], extra.outputs[0]], name="late_add")
    add.outputs[0].name = "late"
    model.graph.extend([extra, add])
    last_tanh = [n for n in model.graph if n.op_type == "Tanh" and n is not extra][-1]
    add.replace_input_with(0, last_tanh.inputs[0])
    last_tanh.replace_input_with(0, add.outputs[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_mask, "no attn_mask"),
        (side_network, "per_layer_embedding"),
        (lambda m: setattr(m.graph.inputs[1], "name", "positions"), "no input 'position_ids'"),
        (lambda m: setattr(m.graph.outputs[0], "name", "scores"), "no output 'logits'"),
        (lambda m: FastV(k=1)(m), "already selects"),
    ],
)
def test_refusals_say_why(change, says):
    with pytest.raises(GraphError, match=says):
        FastV(k=2, r=0.5)(broken(change))


def test_a_graph_without_attention_is_refused():
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 24]> g (float[2] x) => (float[2] y) { y = Tanh(x) }')
    with pytest.raises(GraphError, match="no Attention node"):
        FastV()(model)


@pytest.mark.parametrize(("fields", "says"), [({"k": -1}, "k is -1"), ({"r": 1.0}, "r is 1.0"), ({"r": -0.1}, "r is")])
def test_parameters_out_of_range_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        FastV(**fields)


def test_k_beyond_the_layers_is_refused():
    with pytest.raises(GraphError, match="k is 3, the decoder has 3 layers"):
        FastV(k=3)(build(weights(0, LAYERS, 2, 2), CAPACITY))
