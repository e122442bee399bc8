"""Cache policies' graphs: against numpy, as identities, and as TensorRT-RTX engines."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtrim.graphs.boundary import cache_specs, compacts
from vlmtrim.graphs.caches import load_policy, policy_names
from vlmtrim.graphs.caching import cache_graphs
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.keeping import CANDIDATE, NO_ENTRY, STAYS, CachePolicy
from vlmtrim.runtime import engines
from vlmtrim.runtime.engines import build
from vlmtrim.runtime.engines.profiles import Range

HEADS, KV, SIZE, LAYERS, CAPACITY = 4, 2, 16, 3, 48


def made(policy, dtype="float32", capacity=CAPACITY):
    """(graphs, specs) of a policy on a decoder of three layers."""
    groups = tuple(CacheGroup((layer,), capacity, KV, SIZE) for layer in range(LAYERS))
    record = CachePolicy(policy.describe(), policy.rows, policy.count, 0.5, compacts(groups), seed=policy.noise)
    specs = cache_specs(record, groups, dtype, HEADS, policy.sets(KV), policy.maps(KV), policy.merges)
    return cache_graphs(policy, specs), specs


def session(model, tmp_path_factory):
    import onnxruntime

    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    ir.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


@pytest.fixture(scope="module")
def snapkv(tmp_path_factory):
    graphs, _ = made(load_policy("snapkv")())
    return {name: session(graph, tmp_path_factory) for name, graph in graphs.items()}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10), st.floats(0, 1, width=32), st.integers(0, 2**32 - 1), st.booleans())
def test_order_is_a_permutation_of_what_stays_and_then_of_what_goes(snapkv, judged, text, share, seed, ties):
    """Best candidates, lowest slot first in ties, and all text, ascending; every set of a layer as many."""
    random, window = np.random.default_rng(seed), judged + text + 3
    kinds = np.full((LAYERS, 2, window), NO_ENTRY)
    for layer in range(LAYERS):
        for row in range(2):
            kinds[layer, row, : judged + text] = random.permutation([CANDIDATE] * judged + [STAYS] * text)
    scores = random.random((LAYERS, 2, KV, window), dtype=np.float32)
    scores = np.round(scores * 3) / 3 if ties else scores
    feeds = {"key_scores": scores, "key_kinds": kinds, "share": np.array(share, dtype=np.float32)}
    order, counts = snapkv["policy"].run(None, feeds)
    kept = int(np.round(np.float32(share) * np.float32(judged)))
    assert (counts == text + kept).all()
    for layer, row, head in np.ndindex(LAYERS, 2, KV):
        found, kind = order[layer, row, head], kinds[layer, row]
        assert sorted(found) == list(range(window))
        best = sorted(np.flatnonzero(kind == CANDIDATE), key=lambda slot: (-scores[layer, row, head, slot], slot))
        expected = sorted([*best[:kept], *np.flatnonzero(kind == STAYS)])
        np.testing.assert_array_equal(found[: text + kept], expected)


def test_scores_are_the_softmax_of_the_rows_that_count(snapkv):
    """Causal, filled entries only, mean over the heads of a key head; a row of slot -1 counts nothing."""
    random, window = np.random.default_rng(0), 30
    queries = random.normal(size=(2, HEADS, 3, SIZE)).astype(np.float32)
    cache = random.normal(size=(2, KV, CAPACITY, SIZE)).astype(np.float32)
    slots, kinds = np.array([[-1, 20, 25], [10, 18, 19]]), np.ones((2, window), dtype=np.int64)
    kinds[0, 26:], kinds[1, 20:] = NO_ENTRY, NO_ENTRY
    feeds = {"score_queries": queries, "row_slots": slots, "key_kinds": kinds, "past_key_values.key": cache}
    (found,) = snapkv["score"].run(None, feeds)
    expected = np.zeros((2, KV, window))
    for row, head, r in np.ndindex(2, HEADS, 3):
        if slots[row, r] >= 0:
            logits = cache[row, head // (HEADS // KV), : slots[row, r] + 1] @ queries[row, head, r]
            paid = np.exp(logits - logits.max())
            expected[row, head // (HEADS // KV), : len(paid)] += paid / paid.sum() / (HEADS // KV)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    none = {**feeds, "score_queries": queries[:, :, :0], "row_slots": slots[:, :0]}
    assert not snapkv["score"].run(None, none)[0].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_what_goes_is_averaged_into_its_nearest_entry_that_stays(merging, entries, seed):
    random = np.random.default_rng(seed)
    counts, kinds = np.array([1, 1]), np.full((2, 40), NO_ENTRY)
    order, cache = np.zeros((2, 1, entries), dtype=np.int64), random.normal(size=(2, KV, CAPACITY, SIZE))
    for row in range(2):
        kinds[row, :entries], counts[row] = CANDIDATE, random.integers(1, entries + 1)
        order[row, 0, : counts[row]] = np.sort(random.permutation(entries)[: counts[row]])
    cache = cache.astype(np.float32)
    feeds = {"order": order, "counts": counts, "key_kinds": kinds}
    found = merging.run(None, {**feeds, "past_key_values.key": cache, "past_key_values.value": cache + 1})
    for row, states in np.ndindex(2, 2):
        slots = order[row, 0, : counts[row]]
        nearest = np.abs(np.arange(entries)[:, None] - slots).argmin(axis=1)
        means = [(cache + states)[row, :, :entries][:, nearest == i].mean(axis=1) for i in range(counts[row])]
        np.testing.assert_allclose(found[states][row, :, : counts[row]], np.stack(means, axis=1), atol=1e-5)


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    return session(made(load_policy("elastic")(merge=True))[0]["compact-0"], tmp_path_factory)


@pytest.mark.parametrize(
    "dtype", ["float16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "bfloat16"))]
)
@pytest.mark.parametrize("name", policy_names())
def test_every_policy_builds_as_engines(name, dtype, tmp_path):
    """Windows beyond the largest K of TensorRT's TopK."""
    fields = {"elastic": {"merge": True}, "prefixkv": {"table": tuple((s / 10,) * LAYERS for s in range(11))}}
    policy = load_policy(name)(**fields.get(name, {}))
    graphs, specs = made(policy, dtype, capacity=4096)
    trt = engines.import_library("tensorrt-rtx")
    sizes = {"B": Range(1, 1, 2), "W": Range(1, 640, 4096), "C": Range(4096, 4096, 4096), "M": Range(1, 64, 4096)}
    profile = {**sizes, "R": Range(0, policy.count, policy.count)}
    for graph, model in graphs.items():
        path = tmp_path / specs[graph].file
        ir.save(model, path)
        engine, _ = build._build(trt, "tensorrt-rtx", path, specs[graph], {"all": profile})
        assert len(engine) > 10_000
