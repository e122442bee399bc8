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
from vlmtrim.graphs.passes.last_row import last_row
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.engines import profiles

W = decoders.weights()
FORMS = [form for form in decoders.FORMS if form != "written-out"]
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
    """own-row and no-rope read norms, projections and rotary embeddings."""
    kept = []
    for form in FORMS:
        model = FastV(k=2, r=0.5, score=score)(own_form(decoders.build(form, W), CAPACITY))
        x = np.random.default_rng(1).normal(size=(14, decoders.HIDDEN)).astype(np.float32)
        kept.append(Static(session(model), removed=0.5)(x, VISUAL[0])["kept_indices"].tolist())
    assert all(one == kept[0] for one in kept)


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("written-out", {}, "layer 0: expected the operator Attention or GroupQueryAttention; found Softmax"),
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
    with pytest.raises(GraphError, match=r"layer 0: .*expected a mask of padding.* found Not \(turned\)"):
        own_form(model, CAPACITY)


@pytest.mark.parametrize(("provider", "family"), [("default", "llava"), ("cpu", "llava"), ("default", "qwen-vl")])
def test_decoders_of_mobius(tmp_path, provider, family):
    """The same, and an engine of it, with the selection and two profiles, built by TensorRT-RTX without a GPU."""
    pytest.importorskip("mobius", reason="mobius-onnx is not installed (extra peers)")
    text, head, _ = exporters.text_model("qwen2_vl" if family == "qwen-vl" else "Llama")
    path = exporters.by_mobius(text, head, tmp_path / "model.onnx", provider, family)
    axes = 3 if family == "qwen-vl" else 0
    model = last_row(own_form(load(path), CAPACITY))
    sizes = {"layers": exporters.LAYERS, "kv": exporters.KV, "hidden": exporters.HIDDEN}
    lint(model, spec(**sizes, vocabulary=exporters.VOCABULARY, axes=axes or 1))
    own = Static(session(FastV(k=2, r=0.5)(model, visual_tokens=7)), axes, 0.5)
    compare(Loop(session(FastV(k=2, r=0.5)(load(path))), 1, axes=axes), own, 4, VISUAL, axes, exporters.HIDDEN)
    ir.save(model, tmp_path / "decoder.onnx")
    dims = {"B": (1, 1), "S": (1, CAPACITY), "N": (0, 7), "W0": (1, CAPACITY), "W1": (1, CAPACITY - 3)}
    groups = FastV(k=2, r=0.5).groups((CacheGroup(tuple(range(exporters.LAYERS)), CAPACITY, exporters.KV, 16),), 7)
    whole = decoder_spec(
        dtype="float32",
        hidden=exporters.HIDDEN,
        vocabulary=exporters.VOCABULARY,
        groups=groups,
        selects=True,
        position_axes=axes or 1,
    )
    lint(model, whole)
    contract = Contract("mobius", "float32", {"decoder": whole}, groups, dims, {}, CAPACITY, 1, 7, 0, (1,))
    trt, ranges = engines.import_library("tensorrt-rtx"), profiles.decoder_profiles(contract)
    engine, _ = engines._build(trt, "tensorrt-rtx", tmp_path / "decoder.onnx", whole, ranges)
    assert set(ranges) == {"prefill", "decode"} and len(engine) > 100_000
