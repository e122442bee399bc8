"""Decoders of others in the form of our contract: equal to themselves, selections and engines included."""

import exporters
import foreign_decoders as decoders
import numpy as np
import onnx_ir as ir
import pytest
from plain_loop import Loop, session

from vlmtrim.graphs import FastV, GraphError, load
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup, Contract, kept_count
from vlmtrim.graphs.foreign.own_form import own_form
from vlmtrim.graphs.lint import lint
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.passes.last_row import last_row
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.engines import profiles

W = decoders.weights()
FORMS = decoders.FORMS
CAPACITY, VISUAL = 64, [[1, 2, 3, 4, 8, 9, 10]]


class Static:
    """Feeds a decoder of the contract, one row; caches are kept in numpy."""

    def __init__(self, graph, axes=0, removed=None):
        self.graph, self.axes, self.removed = graph, axes, removed
        self.caches = {
            i.name: np.zeros((1, *i.shape[1:]), np.float32) for i in graph.get_inputs() if i.name[:4] == "past"
        }
        self.groups = sum(i.name.startswith("write_indices") for i in graph.get_inputs())
        self.lengths, self.position = [0] * self.groups, 0

    def __call__(self, x, visual=()):
        at = self.position + np.arange(len(x))[None]
        feeds = {
            "inputs_embeds": x[None],
            "position_ids": np.stack([at] * self.axes) if self.axes else at,
            "last_index": np.array([len(x) - 1]),
            **self.caches,
        }
        if self.removed is not None:
            feeds["visual_positions"] = np.array([visual], np.int64).reshape(1, -1)
        for g in range(self.groups):
            gone = len(visual) - kept_count(len(visual), self.removed) if g == self.groups - 1 and self.removed else 0
            feeds[f"write_indices.{g}"] = np.array([self.lengths[g]])
            self.lengths[g] += len(x) - gone
            feeds[f"key_positions.{g}"] = np.arange(self.lengths[g])
        outputs = dict(zip([o.name for o in self.graph.get_outputs()], self.graph.run(None, feeds), strict=True))
        self.caches = {name: outputs[name.replace("past_key_values", "present")] for name in self.caches}
        self.position += len(x)
        return outputs


def spec(layers=decoders.LAYERS, kv=decoders.KV, hidden=decoders.HIDDEN, vocabulary=decoders.VOCABULARY, axes=1):
    group = CacheGroup(tuple(range(layers)), CAPACITY, kv, 16)
    return decoder_spec(
        dtype="float32", hidden=hidden, vocabulary=vocabulary, groups=(group,), selects=False, position_axes=axes
    )


def compare(plain, own, steps, visual, axes=0, hidden=decoders.HIDDEN):
    """Last logits, kept tokens and caches of both, step by step."""
    random = np.random.default_rng(0)
    for step in range(steps):
        x = random.normal(size=(1 if step else 14, hidden)).astype(np.float32)
        want, have = (
            plain([x], None if step or not visual else visual),
            own(x, visual[0] if visual and not step else ()),
        )
        close(have["logits"][0], want["logits"][0, -1])
        if "kept_indices" in want:
            assert have["kept_indices"].tolist() == want["kept_indices"].tolist()
        for name, value in want.items():
            if name.startswith("present"):
                close(have[name][:, :, : value.shape[2]], value)


def close(have, want):
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("form", FORMS)
def test_the_decoder_computes_what_it_did(form):
    model = own_form(decoders.build(form, W), CAPACITY)
    lint(model, spec())
    compare(Loop(session(decoders.build(form, W)), 1), Static(session(model)), 5, None)
    compare(Loop(session(decoders.build(form, W)), 1), Static(session(last_row(model))), 5, None)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_selection_keeps_the_same_in_both_forms(form, k):
    foreign = FastV(k=k, r=0.5)(decoders.build(form, W))
    own = FastV(k=k, r=0.5)(last_row(own_form(decoders.build(form, W), CAPACITY)))
    compare(Loop(session(foreign), 1), Static(session(own), removed=0.5), 5, VISUAL)


@pytest.mark.parametrize("score", ["no-rope", "own-row", "dart"])
def test_rules_that_read_layers_know_these(score):
    """own-row and no-rope read norms, projections and rotary embeddings, which two of the forms write out."""
    kept = []
    for form in FORMS:
        model = FastV(k=2, r=0.5, score=score)(own_form(decoders.build(form, W), CAPACITY))
        x = np.random.default_rng(1).normal(size=(14, decoders.HIDDEN)).astype(np.float32)
        kept.append(Static(session(model), removed=0.5)(x, VISUAL[0])["kept_indices"].tolist())
    assert all(one == kept[0] for one in kept)


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("attention", {"ids": True}, "expected inputs_embeds"),
        ("attention", {"last": True}, r"expected logits \[B, S, V\] of all tokens"),
    ],
)
def test_what_has_no_such_form_is_refused(form, fields, message):
    with pytest.raises(GraphError, match=message):
        own_form(decoders.build(form, W, **fields), CAPACITY)


def test_a_mask_of_more_than_padding_is_refused():
    """Behind a Not: what it says is no longer which tokens are padding."""
    model = decoders.build("attention", W)
    node = next(node for node in model.graph if node.op_type == "Expand")
    turned = ir.node("Not", [node.outputs[0]], name="turned")
    turned.outputs[0].name = "turned"
    turned.outputs[0].type, turned.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(turned.outputs[0])
    turned.replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, turned)
    with pytest.raises(GraphError, match=r"layer 0: .*expected causal attention.* found that token 0 .* does not see"):
        own_form(model, CAPACITY)


def _edited(find, index, make):
    """The written-out decoder with the result of ``make(ops, value)`` in the place of a node's input."""
    model = decoders.build("written-out", W)
    node = find(next(node for node in model.graph if node.op_type == "Softmax"))
    ops, value = Ops("edited"), node.inputs[index]
    made = make(ops, value)
    made.type, made.shape = value.type, value.shape
    model.graph.insert_before(node, ops.nodes)
    node.replace_input_with(index, made)
    return model


def _itself(softmax):
    return softmax


def _mask(softmax):
    return softmax.inputs[0].producer()


def _keys(softmax):
    """The Reshape by which a head's keys are there for each of its queries."""
    product = _mask(softmax).inputs[0].producer().inputs[0].producer()
    return product.inputs[1].producer().inputs[0].producer()


def _turned(ops, states):
    """[B, KV, G, T, Dh] as [B, G, KV, T, Dh]: every query head reads a key head, and not its own."""
    return ops("Transpose", states, perm=[0, 2, 1, 3, 4])


def _window(ops, logits):
    """Of 32 tokens: short steps do not show it."""
    size = ops("Shape", logits, start=3)
    first = ops("Sub", size, ops.const([32]))
    number = ops("Range", ops.const(0), ops("Squeeze", size, ops.const([0])), ops.const(1))
    return ops("Where", ops("Less", number, first), ops.const(-1e9, np.float32), logits)


@pytest.mark.parametrize(
    ("find", "make", "message"),
    [
        (_itself, _window, "token 0 of a step behind 63 others does not see token 0: windows"),
        (_mask, lambda ops, x: ops("Tanh", x), "expected logits to be products times a number"),
        (_itself, lambda ops, x: ops("Add", x, ops.const(0.5, np.float32)), "expected logits to be products times"),
        (_keys, _turned, "expected .* by head and times a number"),
    ],
)
def test_other_attentions_are_refused(find, make, message):
    with pytest.raises(GraphError, match=rf"layer 0: Softmax .*{message}"):
        own_form(_edited(find, 0, make), CAPACITY)


def _windowed(form):
    """A decoder whose first layer sees 32 tokens."""
    if form == "written-out":
        return _edited(_itself, 0, _window)
    model = decoders.build(form, W)
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 32)
    return model


@pytest.mark.parametrize("form", ["written-out", "group-query"])
def test_windows_are_those_of_the_checkpoint(form):
    """In 25 steps behind 14 tokens they show."""
    model = own_form(_windowed(form), CAPACITY, (32, 0, 0, 0))
    lint(model, spec())
    compare(Loop(session(_windowed(form)), 1), Static(session(last_row(model))), 25, None)
    for windows, message in (
        ((24, 0, 0, 0), "layer 0: .*expected causal attention to (the last )?24 tokens, as in the checkpoint"),
        ((32, 32, 0, 0), "layer 1: .*expected causal attention to (the last )?32 tokens, as in the checkpoint"),
        ((), "layer 0: .*expected causal attention to all tokens"),
    ):
        with pytest.raises(GraphError, match=message):
            own_form(_windowed(form), CAPACITY, windows)


def _by_mobius(provider, family="llava"):
    def make(path):
        pytest.importorskip("mobius", reason="mobius-onnx is not installed (extra peers)")
        text, head, _ = exporters.text_model("qwen2_vl" if family == "qwen-vl" else "Llama")
        return exporters.by_mobius(text, head, path, provider, family)

    return make


def _by_torch(family, dynamo, opset, implementation="eager"):
    def make(path):
        text, head, _ = exporters.text_model(family, implementation)
        return exporters.by_torch(text, head, path, dynamo, opset, 3 * (family == "qwen2_vl"))

    return make


# How a decoder is made, and how many numbers a position has.
MADE = {
    "mobius": (_by_mobius("default"), 1),
    "mobius-cpu": (_by_mobius("cpu"), 1),
    "mobius-mrope": (_by_mobius("default", "qwen-vl"), 3),
    "traced": (_by_torch("Qwen2", False, 17), 1),
    "traced-sdpa": (_by_torch("Llama", False, 18, "sdpa"), 1),
    "traced-mrope": (_by_torch("qwen2_vl", False, 17), 3),
    "exported": (_by_torch("Llama", True, 18), 1),
    "exported-23": (_by_torch("Llama", True, 23, "sdpa"), 1),
}
SLOW = ("exported", "exported-23")  # torch.export takes its time


@pytest.mark.parametrize("maker", [pytest.param(maker, marks=[pytest.mark.slow] * (maker in SLOW)) for maker in MADE])
def test_decoders_of_others(tmp_path, maker):
    """The same, and an engine of it, with the selection and two profiles, built by TensorRT-RTX without a GPU."""
    make, axes = MADE[maker]
    path = make(tmp_path / "model.onnx")
    model = last_row(own_form(load(path), CAPACITY))
    sizes = {"layers": exporters.LAYERS, "kv": exporters.KV, "hidden": exporters.HIDDEN}
    lint(model, spec(**sizes, vocabulary=exporters.VOCABULARY, axes=axes))
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 2 * exporters.LAYERS
    ir.save(FastV(k=2, r=0.5)(model, visual_tokens=7), tmp_path / "decoder.onnx")
    ir.save(FastV(k=2, r=0.5)(load(path)), tmp_path / "trimmed.onnx")
    stacked = axes if axes > 1 else 0
    foreign = Loop(session(tmp_path / "trimmed.onnx"), 1, axes=stacked)
    compare(foreign, Static(session(tmp_path / "decoder.onnx"), stacked, 0.5), 4, VISUAL, stacked, exporters.HIDDEN)
    dims = {"B": (1, 1), "S": (1, CAPACITY), "N": (0, 7), "W0": (1, CAPACITY), "W1": (1, CAPACITY - 3)}
    groups = FastV(k=2, r=0.5).groups((CacheGroup(tuple(range(exporters.LAYERS)), CAPACITY, exporters.KV, 16),), 7)
    whole = decoder_spec(
        dtype="float32",
        hidden=exporters.HIDDEN,
        vocabulary=exporters.VOCABULARY,
        groups=groups,
        selects=True,
        position_axes=axes,
    )
    lint(model, whole)
    contract = Contract(maker, "float32", {"decoder": whole}, groups, dims, {}, CAPACITY, 1, 7, 0, (1,))
    trt, ranges = engines.import_library("tensorrt-rtx"), profiles.decoder_profiles(contract)
    engine, _ = engines._build(trt, "tensorrt-rtx", tmp_path / "decoder.onnx", whole, ranges)
    assert set(ranges) == {"prefill", "decode"} and len(engine) > 100_000
