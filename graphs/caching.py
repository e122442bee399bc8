"""Builds the graphs of a cache policy (:mod:`vlmtrim.graphs.keeping`): score, policy and compact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.caches import Budgeting, Policy, Scoring
from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.keeping import CANDIDATE, COMPACT, FRESH, NO_ENTRY, POLICY, SCORE, STAYS
from vlmtrim.graphs.lint import lint
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.surgery.select import kept_first, top

OPSET = 24  # TensorScatter
_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}
_UNSEEN = -3e38  # finite, so that a row that sees nothing has a softmax


def cache_graphs(policy: Policy, specs: Mapping[str, GraphSpec]) -> dict[str, ir.Model]:
    """The graphs of a policy by name, each held to its spec (:func:`vlmtrim.graphs.boundary.cache_specs`)."""
    builders = {SCORE: _score, POLICY: _choose}
    longest = max(_static(spec.inputs[-1], 2) for name, spec in specs.items() if name.startswith(COMPACT))
    models = {name: builders.get(name, _compact)(policy, spec, longest) for name, spec in specs.items()}
    for name, model in models.items():
        lint(model, specs[name])
    return models


class Building:
    """A graph that begins with the inputs of a spec and ends with its outputs."""

    def __init__(self, spec: GraphSpec, prefix: str):
        self.spec, self.ops = spec, Ops(prefix)
        self.inputs = {t.name: ir.val(t.name, dtype=_DTYPES[t.dtype], shape=t.shape) for t in spec.inputs}

    def __getitem__(self, name: str) -> ir.Value:
        return self.inputs[name]

    def finish(self, **outputs: ir.Value) -> ir.Model:
        """The model; outputs by name, with ``_`` where the spec has a dot."""
        found = []
        for tensor in self.spec.outputs:
            value = outputs[tensor.name.replace(".", "_")]
            value.name, value.type = tensor.name, ir.TensorType(_DTYPES[tensor.dtype])
            value.shape = ir.Shape(tensor.shape)
            found.append(value)
        name = self.spec.file.removesuffix(".onnx")
        graph = ir.Graph(list(self.inputs.values()), found, nodes=self.ops.nodes, opset_imports={"": OPSET}, name=name)
        return ir.Model(graph, ir_version=10)


def _score(policy: Policy, spec: GraphSpec, longest: int) -> ir.Model:
    """The entries of one layer by what the rows pay them, as the policy sums it."""
    graph = Building(spec, "score")
    ops, queries, kinds, slots = graph.ops, graph["score_queries"], graph["key_kinds"], graph["row_slots"]
    cache, none = graph["past_key_values.key"], ops.const([0])
    (heads, kv, size) = (_static(spec.inputs[0], 1), _static(spec.inputs[-1], 1), _static(spec.inputs[-1], 3))
    batch, rows, window = ops.dim(queries, 0), ops.dim(queries, 2), ops.dim(kinds, 1)
    keys = ops.slice(cache, none, window, axis=2)
    grouped = ops.concat(batch, ops.const([kv]), ops("Mul", rows, ops.const([heads // kv])), ops.const([size]))
    grouped = ops("Reshape", queries, grouped, allowzero=1)
    logits = ops("MatMul", grouped, ops("Transpose", keys, perm=[0, 1, 3, 2]))
    shape = ops.concat(batch, ops.const([heads]), rows, window)
    logits = ops("Cast", ops("Reshape", logits, shape, allowzero=1), to=ir.DataType.FLOAT)
    if "key_noise" in graph.inputs:
        logits = ops("Add", logits, ops("Unsqueeze", graph["key_noise"], ops.const([1, 2])))
        logits = ops("Div", logits, graph["temperature"])
    slot = ops("Range", ops.const(0), ops("Squeeze", window, none), ops.const(1))
    before = ops("LessOrEqual", slot, ops("Unsqueeze", slots, ops.const([1, 3])))  # [B, 1, R, W]
    filled = ops("Greater", kinds, ops.const(NO_ENTRY))
    seen = ops("And", before, ops("Unsqueeze", filled, ops.const([1, 2])))
    logits = ops("Where", seen, logits, ops.const(_UNSEEN, np.float32))
    weights = ops("Cast", ops("GreaterOrEqual", slots, ops.const(0)), to=ir.DataType.FLOAT)
    scoring = Scoring(
        ops=ops,
        logits=logits,
        probabilities=ops("Softmax", logits, axis=-1),
        seen=seen,
        weights=ops("Unsqueeze", weights, ops.const([1, 3])),
        row_slots=slots,
        kinds=kinds,
        keys=keys,
        heads=heads,
        kv_heads=kv,
    )
    return graph.finish(key_scores=policy.score(scoring))


def _choose(policy: Policy, spec: GraphSpec, longest: int) -> ir.Model:
    """Which entries of every layer stay."""
    graph = Building(spec, "policy")
    ops, kinds, scores = graph.ops, graph["key_kinds"], graph["key_scores"]
    sets = _static(spec.outputs[0], 2)
    budget = Budgeting(
        ops=ops,
        scores=scores,
        kinds=kinds,
        share=graph["share"],
        candidates=_count(ops, kinds, CANDIDATE),
        stays=_count(ops, kinds, STAYS),
        judged=ops("Add", _count(ops, kinds, CANDIDATE), _count(ops, kinds, FRESH)),
        sets=sets,
        longest=longest,
    )
    kept = ops("Min", ops("Max", policy.counts(budget), ops.const(0)), budget.judged)
    ranking = policy.ranking(budget, kept)
    each = ops("Unsqueeze", kinds, ops.const([2]))  # [L, B, 1, W]
    ranking = ops("Where", ops("Greater", each, ops.const(STAYS)), ranking, ops.const(-np.inf, np.float32))
    ranking = ops("Where", ops("Equal", each, ops.const(STAYS)), ops.const(np.inf, np.float32), ranking)
    counts = ops("Add", kept, budget.stays)
    order = _first(ops, ranking, counts, sets, longest)
    return graph.finish(order=order, counts=counts)


def _first(ops: Ops, ranking: ir.Value, counts: ir.Value, sets: int, longest: int) -> ir.Value:
    """Slots [L, B, X, W] of which the ``counts`` [L, B] of highest rank come first, ascending."""
    shape, window = ops("Shape", ranking), ops.dim(ranking, 3)
    layers, batch = ops.dim(ranking, 0), ops.dim(ranking, 1)
    flat = ops("Reshape", ranking, ops.concat(ops.const([-1]), window))  # a row a set
    each = ops("Expand", ops("Unsqueeze", counts, ops.const([2])), ops.concat(layers, batch, ops.const([sets])))
    each = ops("Reshape", each, ops.const([-1, 1]))
    best = top(ops, flat, window, longest, largest=True)
    place = ops("Range", ops.const(0), ops("Squeeze", window, ops.const([0])), ops.const(1))
    mark = ops("Cast", ops("Less", place, each), to=ir.DataType.INT64)
    keep = ops("ScatterElements", ops("Sub", best, best), best, mark, axis=1)
    return ops("Reshape", kept_first(ops, keep, window, each), shape)


def _compact(policy: Policy, spec: GraphSpec, longest: int) -> ir.Model:
    """What stays of one layer's caches, at their beginning. It is gathered before the first entry is overwritten."""
    graph = Building(spec, "compact")
    ops, order, caches = graph.ops, graph["order"], {}
    batch, kept = ops.dim(order, 0), ops.dim(order, 2)
    kv, size = _static(spec.inputs[-1], 1), _static(spec.inputs[-1], 3)
    index = ops("Unsqueeze", ops("Expand", order, ops.concat(batch, ops.const([kv]), kept)), ops.const([3]))
    index = ops("Expand", index, ops.concat(batch, ops.const([kv]), kept, ops.const([size])))
    begin = ops("Expand", ops.const([0]), batch)
    spans = _spans(graph) if policy.merges else None
    for kind in ("key", "value"):
        past = graph[f"past_key_values.{kind}"]
        stays = ops("GatherElements", past, index, axis=2)
        if spans is not None:
            stays = _averaged(ops, past, stays, ops.dim(graph["key_kinds"], 1), spans)
        caches[f"present_{kind}"] = ops("TensorScatter", past, stays, begin, axis=2)
    return graph.finish(**caches)


def _spans(graph: Building) -> tuple[ir.Value, ir.Value]:
    """Of every entry that stays, int64 [B, M, 1] each: the first slot that is nearest to it, and the first behind them;
    the earlier of two at the same distance. What is behind the last that counts is a span of its own slot."""
    ops, order = graph.ops, graph.ops("Squeeze", graph["order"], graph.ops.const([1]))  # [B, M]
    count = ops("Unsqueeze", graph["counts"], ops.const([1]))
    filled = ops("Cast", ops("Greater", graph["key_kinds"], ops.const(NO_ENTRY)), to=ir.DataType.INT64)
    entries = ops("ReduceSum", filled, ops.const([1]), keepdims=1)  # [B, 1]
    size, one = ops.dim(order, 1), ops.const([1])
    number = ops("Range", ops.const(0), ops("Squeeze", size, ops.const([0])), ops.const(1))
    following = ops("Concat", ops.slice(order, one, size, axis=1), entries, axis=1)
    middle = ops("Add", ops("Div", ops("Add", order, following), ops.const(2)), ops.const(1))
    last = ops("Equal", number, ops("Sub", count, one))
    end = ops("Where", last, entries, middle)
    start = ops(
        "Concat", ops("Mul", entries, ops.const([0])), ops.slice(end, ops.const([0]), ops("Sub", size, one), 1), axis=1
    )
    counts = ops("Less", number, count)
    start = ops("Where", counts, start, order)
    end = ops("Where", counts, end, ops("Add", order, ops.const(1)))
    return ops("Unsqueeze", start, ops.const([2])), ops("Unsqueeze", end, ops.const([2]))


def _averaged(
    ops: Ops, past: ir.Value, stays: ir.Value, window: ir.Value, spans: tuple[ir.Value, ir.Value]
) -> ir.Value:
    """Means [B, KV, M, Dh] over the spans, by differences of running sums in float32: TensorRT scatters no sums."""
    start, end = spans
    live = ops("Cast", ops.slice(past, ops.const([0]), window, axis=2), to=ir.DataType.FLOAT)
    by_token = ops("Transpose", live, perm=[0, 2, 1, 3])  # [B, W, KV, Dh]
    zero = ops("Mul", ops.slice(by_token, ops.const([0]), ops.const([1]), axis=1), ops.const(0.0, np.float32))
    sums = ops("Concat", zero, ops("CumSum", by_token, ops.const(1)), axis=1)
    total = ops("Sub", ops("GatherND", sums, end, batch_dims=1), ops("GatherND", sums, start, batch_dims=1))
    width = ops("Unsqueeze", ops("Sub", end, start), ops.const([3]))  # [B, M, 1, 1]
    mean = ops("Div", total, ops("Cast", width, to=ir.DataType.FLOAT))
    mean = ops("CastLike", ops("Transpose", mean, perm=[0, 2, 1, 3]), stays)
    alone = ops("Equal", ops("Transpose", width, perm=[0, 2, 1, 3]), ops.const(1))
    return ops("Where", alone, stays, mean)  # what nothing was merged into stays to the bit


def _count(ops: Ops, kinds: ir.Value, kind: int) -> ir.Value:
    """How many entries are of a kind, [L, B, W] -> [L, B]."""
    found = ops("Cast", ops("Equal", kinds, ops.const(kind)), to=ir.DataType.INT64)
    return ops("ReduceSum", found, ops.const([2]), keepdims=0)


def _static(tensor: Any, axis: int) -> int:
    size = tensor.shape[axis]
    assert isinstance(size, int)
    return size
