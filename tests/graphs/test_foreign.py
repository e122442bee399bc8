"""FastV in decoders with the boundary that exporters share, against a decoder in numpy that really removes tokens."""

import foreign_decoders as decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from oracles import normed as oracle
from oracles.selection import kept_by_score, kept_by_stride
from plain_loop import Loop, session

from vlmtrim.graphs import FastV, GraphError

W = decoders.weights()
DEEP = {
    name: value if not isinstance(value, list) else [{n: m.astype(np.float64) for n, m in x.items()} for x in value]
    for name, value in W.items()
}
VISUAL = [[1, 2, 3, 4, 8, 9, 10], [2, 3, 5, 6, 7, 8, 9]]  # two pictures in the first row, one and a half in the other
LENGTHS = (14, 11)


@pytest.fixture(scope="module")
def graphs():
    cache = {}

    def get(form, k=None, r=0.5, **fields):
        key = (form, k, r, *sorted((name, str(value)) for name, value in fields.items()))
        if key not in cache:
            model = decoders.build(form, W, **fields)
            cache[key] = session(model if k is None else FastV(k=k, r=r)(model))
        return cache[key]

    return get


def prompt(seed=0, lengths=LENGTHS):
    random = np.random.default_rng(seed)
    return [random.normal(size=(n, decoders.HIDDEN)).astype(np.float32) for n in lengths]


class Expected:
    """The oracle's row after row; ``k`` None: nothing is removed."""

    def __init__(self, k, r, rows):
        none = np.zeros((decoders.KV, 0, decoders.DH))
        self.k, self.r, self.past = k, r, [[(none, none)] * decoders.LAYERS for _ in range(rows)]
        self.counts = [0] * rows

    def __call__(self, row, x, visual):
        def stay(scores):
            if self.k == 0:
                return np.array(kept_by_stride(len(x), visual, self.r, 0))
            return np.array(kept_by_score(len(x), visual, [scores[j] for j in visual], self.r))

        at = self.counts[row] + np.arange(len(x))
        choose, deep = stay if visual else lambda _: at - at[0], x.astype(np.float64)
        logits, kept, self.past[row] = oracle.forward(DEEP, deep, at, self.past[row], choose, self.k, decoders.DH)
        self.counts[row] += len(x)
        return logits, kept


def compare(outputs, loop, row, logits, kept, atol=2e-5):
    shift = loop.shifts[row]
    if "kept_indices" in outputs:
        found = outputs["kept_indices"][row]
        real = (found >= shift) & (found < shift + loop.lengths[row])
        assert (found[real] - shift).tolist() == kept.tolist()
        assert [t for t in found if t < shift] == list(range(shift))  # padding is never removed
    else:
        real = np.isin(np.arange(outputs["logits"].shape[1]), shift + np.arange(loop.lengths[row]))
    np.testing.assert_allclose(outputs["logits"][row][real], logits, rtol=0, atol=atol * np.abs(logits).max())


@pytest.mark.parametrize("form", decoders.FORMS)
def test_without_selection_the_oracle_is_the_decoder(graphs, form):
    """The premise of what follows: both writings of the untouched decoder agree."""
    loop, expected, rows = (
        Loop(graphs(form), 2, left=not form.startswith("group-query")),
        Expected(None, 0, 2),
        prompt(),
    )
    outputs = loop(rows)
    for row, x in enumerate(rows):
        compare(outputs, loop, row, *expected(row, x, []))


@pytest.mark.parametrize("k", [0, 1, 2, decoders.LAYERS - 1])
@pytest.mark.parametrize("form", decoders.FORMS)
def test_kept_sets_and_logits_equal_the_oracle(graphs, form, k):
    """Two rows, padded on the left (on the right where attention takes lengths), then 32 steps of one token."""
    loop = Loop(graphs(form, k), 2, left=not form.startswith("group-query"))
    expected, rows = Expected(k, 0.5, 2), prompt(k)
    outputs = loop(rows, VISUAL)
    for row, x in enumerate(rows):
        compare(outputs, loop, row, *expected(row, x, VISUAL[row]))
    lengths = [outputs[f"present.{i}.key"].shape[2] for i in range(decoders.LAYERS)]
    assert lengths == [14 - 3 * (i >= k) for i in range(decoders.LAYERS)]
    if form.startswith("group-query"):
        return  # its decode with rows of different lengths is for buffers of full size, which have one length
    for step in range(32):
        rows = prompt(100 + step, (1, 1))
        outputs = loop(rows)
        for row, x in enumerate(rows):
            compare(outputs, loop, row, *expected(row, x, []))


@pytest.mark.parametrize("form", [form for form in decoders.FORMS if form.startswith("group-query")])
@pytest.mark.parametrize("k", [0, 2])
def test_decoding_with_grouped_queries_equals_the_oracle(graphs, form, k):
    loop, expected, rows = Loop(graphs(form, k), 2), Expected(k, 0.5, 2), prompt(7, (12, 12))
    outputs = loop(rows, VISUAL)
    for step in range(33):
        for row, x in enumerate(rows):
            compare(outputs, loop, row, *expected(row, x, [] if step else VISUAL[row]))
        rows = prompt(200 + step, (1, 1))
        outputs = loop(rows)


@pytest.mark.parametrize("k", [0, 1, decoders.LAYERS - 1])
@pytest.mark.parametrize("form", decoders.FORMS)
def test_nothing_removed_is_bit_equal_with_the_untouched_graph(graphs, form, k):
    """r = 0 with visual tokens, and any r without."""
    left = not form.startswith("group-query")
    for r, visual in ((0, VISUAL), (0.5, None)):
        loops = Loop(graphs(form), 2, left), Loop(graphs(form, k, r), 2, left)
        for step, rows in enumerate([prompt(3), prompt(4, (1, 1)), prompt(5, (1, 1))]):
            want, have = (loop(rows, None if step else visual) for loop in loops)
            for name, value in want.items():
                np.testing.assert_array_equal(have[name], value, err_msg=name)
            if not left:
                break


@pytest.mark.parametrize("form", ["attention", "written-out"])
def test_a_second_picture_in_a_later_turn(graphs, form):
    """What the first turn removed is left out of the later layers' mask; padding on the left stays where it is."""
    loop, expected = Loop(graphs(form, 2), 2), Expected(2, 0.5, 2)
    for turn, (lengths, visual) in enumerate([(LENGTHS, VISUAL), ((1, 1), [[], []]), ((9, 9), [[0, 1, 2], [4, 5, 7]])]):
        rows = prompt(50 + turn, lengths)
        outputs = loop(rows, visual)
        for row, x in enumerate(rows):
            compare(outputs, loop, row, *expected(row, x, visual[row]))


@pytest.mark.parametrize("form", decoders.FORMS)
@pytest.mark.parametrize("k", [0, 2])
def test_ids_instead_of_embeddings(form, k):
    plain, trimmed = decoders.build(form, W, ids=True), FastV(k=k, r=0.5)(decoders.build(form, W, ids=True))
    ids = [np.random.default_rng(1).integers(0, decoders.VOCABULARY, 12) for _ in range(2)]
    assert Loop(session(plain), 2)(ids)["logits"].shape == (2, 12, decoders.VOCABULARY)
    loop, expected = Loop(session(trimmed), 2), Expected(k, 0.5, 2)
    outputs = loop(ids, VISUAL)
    for row, x in enumerate(ids):
        compare(outputs, loop, row, *expected(row, W["embeddings"][x], VISUAL[row]))


@pytest.mark.parametrize("score", ["stride", "random", "divprune", "dart", "no-rope", "coverage", "cdpruner"])
@pytest.mark.parametrize("form", ["attention", "group-query-packed", "group-query-outside"])
def test_every_rule_keeps_its_share_and_takes_no_text(form, score):
    model = FastV(k=2, r=0.5, score=score)(decoders.build(form, W))
    outputs = Loop(session(model), 2)(prompt(1, (12, 12)), VISUAL)
    for row, kept in enumerate(outputs["kept_indices"]):
        assert sorted(set(range(12)) - set(VISUAL[row])) == [t for t in kept if t not in VISUAL[row]]
        assert len(kept) == 12 - 7 + round(7 * 0.5)


@pytest.mark.parametrize("form", ["group-query", "group-query-packed", "group-query-outside"])
@pytest.mark.parametrize("score", ["no-rope", "dart"])
def test_forms_agree_on_a_rule(form, score):
    """Queries and keys are the same whether the rotary embedding lies inside the operator or not."""
    kept = []
    for one in (form, "attention"):
        model = FastV(k=2, r=0.5, score=score)(decoders.build(one, W))
        kept.append(Loop(session(model), 2)(prompt(2, (12, 12)), VISUAL)["kept_indices"].tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize("form", decoders.FORMS)
def test_logits_of_the_last_token_stay_so(form):
    model = FastV(k=1, r=0.5)(decoders.build(form, W, last=True))
    assert list(model.graph.outputs[0].shape) == [model.graph.inputs[0].shape[0], 1, decoders.VOCABULARY]
    loop, expected, rows = Loop(session(model), 2), Expected(1, 0.5, 2), prompt(9, (12, 12))
    logits = loop(rows, VISUAL)["logits"]
    for row, x in enumerate(rows):
        want = expected(row, x, VISUAL[row])[0][-1]
        np.testing.assert_allclose(logits[row, 0], want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_the_boundary_says_what_is_shorter():
    model = FastV(k=2, r=0.5)(decoders.build("attention", W))
    names = [value.name for value in model.graph.inputs]
    assert names == [*(v.name for v in decoders.build("attention", W).graph.inputs), "visual_positions"]
    outputs = {value.name: value for value in model.graph.outputs}
    assert list(outputs)[-1] == "kept_indices"
    assert str(outputs["logits"].shape) == "[B,kept_tokens,17]"
    assert str(outputs["present.1.key"].shape) == "[B,2,T,16]"
    assert str(outputs["present.2.key"].shape) == "[B,2,kept_past + kept_tokens,16]"
    onnx.checker.check_model(ir.to_proto(FastV(k=2, r=0.5)(decoders.build("written-out", W))), full_check=True)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 21])
def test_older_opsets(opset):
    """Shape without a range, axes as attributes; the decoder itself is spelled in what all of them know."""
    model = decoders.build("written-out", W, opset=opset)
    for node in list(model.graph):
        if node.op_type == "Shape" and opset < 15:
            _spell_shape(model, node)
    loop, expected, rows = Loop(session(FastV(k=1, r=0.5)(model)), 2), Expected(1, 0.5, 2), prompt(4)
    outputs = loop(rows, VISUAL)
    for row, x in enumerate(rows):
        compare(outputs, loop, row, *expected(row, x, VISUAL[row]))


def _spell_shape(model, node):
    start, end = (node.attributes.pop(name).as_int() for name in ("start", "end"))
    old = node.outputs[0]
    cut = [ir.node("Constant", [], attributes={"value_ints": [value]}) for value in (start, end)]
    cut.append(ir.node("Slice", [old, cut[0].outputs[0], cut[1].outputs[0]]))
    for index, part in enumerate(cut):
        part.outputs[0].name = f"{old.name}/{index}"
    model.graph.insert_after(node, cut)
    old.replace_all_uses_with(cut[2].outputs[0])
    cut[2].replace_input_with(0, old)


def test_it_is_not_trimmed_twice():
    model = FastV(k=2, r=0.5)(decoders.build("attention", W))
    with pytest.raises(GraphError, match="already selects visual tokens"):
        FastV(k=2, r=0.5)(model)
