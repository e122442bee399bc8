"""The selection subgraph alone, scores given: ONNX Runtime and onnx's reference evaluator against plain Python."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden_text import assert_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from oracles.selection import kept_by_score, kept_by_stride

from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step, load_rule
from vlmtrim.graphs.surgery import select, split

RATIOS = [0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9]
MOST = 64


def selection(r: float, rule: str, seed: int = 0, most: int = MOST) -> ir.Model:
    """hidden, visual_positions, scores, last_index -> kept_indices, gathered hidden, last index."""
    hidden = ir.val("hidden", dtype=ir.DataType.FLOAT, shape=("B", "S", 2))
    visual = ir.val("visual_positions", dtype=ir.DataType.INT64, shape=("B", "N"))
    scores = ir.val("scores", dtype=ir.DataType.FLOAT, shape=("B", "N"))
    last = ir.val("last_index", dtype=ir.DataType.INT64, shape=("B",))
    ops = Ops("select")
    sizes = select.counts(ops, hidden, visual, r, most)
    if rule != "score":
        step = Step(ops, None, [], hidden, hidden, last, visual, None, sizes, seed)
        keep = select.keep_best(ops, load_rule(rule).score(step), visual, sizes, r)
    else:
        keep = select.keep_best(ops, scores, visual, sizes, r)
    survivors = select.compact(ops, keep, last, sizes)
    gathered = select.gather_tokens(ops, hidden, survivors.kept_indices)
    outputs = [survivors.kept_indices, gathered, survivors.last_index]
    for value, dtype in zip(outputs, (ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.INT64), strict=True):
        value.type = ir.TensorType(dtype)
    inputs = [hidden, visual, last] if rule != "score" else [hidden, visual, scores, last]
    graph = ir.Graph(inputs, outputs, nodes=ops.nodes, opset_imports={"": 24}, name="selection")
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def runners():
    cache = {}

    def get(r, rule, evaluator, seed=0, limit=select.TOPK_LIMIT):
        key = (r, rule, evaluator, seed, limit)
        if key not in cache:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(select, "TOPK_LIMIT", limit)
                proto = ir.to_proto(selection(r, rule, seed))
            if evaluator == "onnxruntime":
                session = ort.InferenceSession(proto.SerializeToString())
                cache[key] = lambda feeds: session.run(None, feeds)
            else:
                reference = ReferenceEvaluator(proto)
                cache[key] = lambda feeds: reference.run(None, feeds)
        return cache[key]

    return get


@st.composite
def steps(draw):
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 30))
    visual_count = draw(st.integers(0, tokens - 1))
    # any layout: one image, several, scattered; the last token is text
    visual = [sorted(draw(st.permutations(range(tokens - 1)))[:visual_count]) for _ in range(rows)]
    # few distinct values, so that ties are common
    scores = draw(st.lists(st.lists(st.integers(0, 3), min_size=visual_count, max_size=visual_count),
                           min_size=rows, max_size=rows))  # fmt: skip
    return tokens, visual, scores


def feeds_for(tokens, visual, scores, rule="score"):
    rows, count = len(visual), len(visual[0])
    hidden = np.random.default_rng(0).normal(size=(rows, tokens, 2)).astype(np.float32)
    feeds = {
        "hidden": hidden,
        "visual_positions": np.array(visual, dtype=np.int64).reshape(rows, count),
        "last_index": np.full(rows, tokens - 1, dtype=np.int64),
    }
    if rule == "score":
        feeds["scores"] = np.array(scores, dtype=np.float32).reshape(rows, count)
    return feeds


def check(outputs, feeds, expected):
    kept, gathered, last = outputs
    assert kept.tolist() == expected
    for row, indices in enumerate(expected):
        np.testing.assert_array_equal(gathered[row], feeds["hidden"][row, indices])
        assert last[row] == len(indices) - 1


@pytest.mark.parametrize("evaluator", ["onnxruntime", "reference"])
@settings(max_examples=150, deadline=None)
@given(step=steps(), r=st.sampled_from(RATIOS))
def test_best_scores_survive_and_ties_keep_the_lowest_index(runners, evaluator, step, r):
    tokens, visual, scores = step
    feeds = feeds_for(tokens, visual, scores)
    expected = [kept_by_score(tokens, v, s, r) for v, s in zip(visual, scores, strict=True)]
    check(runners(r, "score", evaluator)(feeds), feeds, expected)


@pytest.mark.parametrize("evaluator", ["onnxruntime", "reference"])
@settings(max_examples=80, deadline=None)
@given(step=steps(), r=st.sampled_from(RATIOS), limit=st.sampled_from([1, 2, 5, 8]))
def test_rounds_of_topk_choose_what_one_would(runners, evaluator, step, r, limit):
    """The same rule, ties included, where a TopK takes at most ``limit``: one to 58 rounds."""
    tokens, visual, scores = step
    feeds = feeds_for(tokens, visual, scores)
    expected = [kept_by_score(tokens, v, s, r) for v, s in zip(visual, scores, strict=True)]
    check(runners(r, "score", evaluator, limit=limit)(feeds), feeds, expected)


@settings(max_examples=100, deadline=None)
@given(step=steps(), r=st.sampled_from(RATIOS), seed=st.sampled_from([0, 1, 7, 1000]))
def test_stride_is_uniform_and_seeded(runners, step, r, seed):
    tokens, visual, _ = step
    feeds = feeds_for(tokens, visual, None, "stride")
    expected = [kept_by_stride(tokens, v, r, seed) if v else list(range(tokens)) for v in visual]
    check(runners(r, "stride", "onnxruntime", seed)(feeds), feeds, expected)


@settings(max_examples=60, deadline=None)
@given(step=steps(), r=st.sampled_from(RATIOS), seed=st.sampled_from([0, 1, 7]))
def test_random_is_numpys_generator(runners, step, r, seed):
    tokens, visual, _ = step
    drawn = np.random.default_rng(seed).random(len(visual[0]), dtype=np.float32)
    feeds = feeds_for(tokens, visual, None, "random")
    expected = [kept_by_score(tokens, v, drawn, r) for v in visual]
    check(runners(r, "random", "onnxruntime", seed)(feeds), feeds, expected)


@pytest.mark.parametrize("r", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_kept_count_is_pythons_round_for_every_number_of_visual_tokens(runners, r):
    for count in range(MOST):
        feeds = feeds_for(count + 1, [list(range(count))], [list(range(count))])
        kept = runners(r, "score", "onnxruntime")(feeds)[0]
        assert kept.shape[1] == 1 + round(count * (1 - r))


def test_topk_runs_on_the_smaller_side():
    """K stays at or below N / 2, so that TensorRT's limit of 3840 allows twice as many visual tokens."""
    for r, largest in ((0.25, 0), (0.75, 1)):
        (topk,) = [node for node in selection(r, "score").graph if node.op_type == "TopK"]
        assert topk.attributes["largest"].as_int() == largest


@pytest.mark.parametrize(
    ("most", "r", "rounds"),
    [(7681, 0.5, 1), (7682, 0.5, 2), (12_800, 0.3, 1), (12_900, 0.3, 2), (12_000, 0.75, 1), (40_000, 0.5, 6)],
)
def test_no_topk_takes_more_than_tensorrt_can(most, r, rounds):
    """K of every TopK at the largest N, as ONNX Runtime computes it: at most 3840 each, together the smaller side."""
    model = selection(r, "score", most=most)
    counts = [node.inputs[1] for node in model.graph if node.op_type == "TopK"]
    for count in counts:
        count.type = ir.TensorType(ir.DataType.INT64)
    model.graph.outputs.extend(counts)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    scores = np.random.default_rng(0).integers(0, 100, (1, most)).astype(np.float32)
    feeds = feeds_for(most + 1, [list(range(most))], scores)
    (
        kept,
        *_,
    ) = outputs = session.run(None, feeds)
    taken = [int(k[0]) for k in outputs[3:]]
    assert len(taken) == rounds and max(taken) <= 3840
    assert sum(taken) == min(round(most * (1 - r)), most - round(most * (1 - r)))
    assert kept[0].tolist() == kept_by_score(most + 1, range(most), scores[0].tolist(), r)


@pytest.mark.parametrize("name", ["winners", "losers", "stride"])
def test_the_subgraph_is_the_golden_text(name):
    """Structure by diff."""
    rule, r = ("stride", 0.5) if name == "stride" else ("score", 0.75 if name == "winners" else 0.25)
    assert_golden(selection(r, rule).graph, Path(__file__).parent / "golden" / f"{name}.txt")


@settings(deadline=None, max_examples=60)
@given(data=st.data(), tokens=st.integers(1, 24))
def test_survivors_see_the_last_survivor_that_they_saw(data, tokens):
    """Runs of tokens that see each other, some of which go."""
    keep = np.array([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))])
    joined = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    ends = [next((j for j in range(i, tokens) if not joined[j]), tokens - 1) for i in range(tokens)]
    kept = np.nonzero(keep[0])[0]
    found = seen_left().run(None, {"seen": [ends], "keep": keep.astype(np.int64), "kept": kept[None]})[0]
    expected = [max(place for place, token in enumerate(kept) if token <= ends[own]) for own in kept]
    assert found.tolist() == [expected]


@cache
def seen_left() -> ort.InferenceSession:
    seen, keep, kept = (ir.val(name, dtype=ir.DataType.INT64, shape=("B", "S")) for name in ("seen", "keep", "kept"))
    kept.shape = ir.Shape(("B", "Sk"))
    ops = Ops("seen")
    left = split._seen_left(ops, seen, select.Survivors(kept, kept, keep), "Sk", "")
    graph = ir.Graph([seen, keep, kept], [left], nodes=ops.nodes, opset_imports={"": 24}, name="seen")
    return ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
