"""agreement.py: one changed promise at a time in a contract that agrees, and what is said of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vlmtrim.graphs import agreement
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup, Contract, GraphSpec, TensorSpec
from vlmtrim.graphs.reading import BundleError

GROUPS = (CacheGroup((0, 1), 64, 2, 8), CacheGroup((2, 3, 4), 56, 2, 8, removed=0.5))


def contract() -> Contract:
    embed = (
        TensorSpec("input_ids", "int64", ("B", "S")),
        TensorSpec("image_features", "float16", ("B", "N", 32)),
        TensorSpec("visual_positions", "int64", ("B", "N")),
    )
    graphs = {
        "vision": GraphSpec(
            "vision.onnx",
            (TensorSpec("pixel_values", "float16", ("I", 3, 28, 28)),),
            (TensorSpec("image_features", "float16", ("I", 16, 32)),),
        ),
        "embed": GraphSpec("embed.onnx", embed, (TensorSpec("inputs_embeds", "float16", ("B", "S", 32)),)),
        "decoder": decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=True),
    }
    return Contract(
        family="llava",
        dtype="float16",
        graphs=graphs,
        groups=GROUPS,
        dims={"I": (1, 8), "B": (1, 2), "S": (1, 64), "N": (0, 48), "W0": (1, 64), "W1": (1, 56)},
        selection={"method": "fastv"},
        max_seq_len=64,
        images_assumed=1,
        image_tokens=16,
        image_token_id=99,
        eos_token_ids=(2, 3),
        image_grid=(4, 4),
    )


def test_a_contract_of_one_piece_agrees():
    agreement.check(contract())


def test_a_strangers_names_make_no_long_refusal():
    whole = contract()
    inputs = whole.graphs["decoder"].inputs
    inputs = tuple(
        dataclasses.replace(t, name=t.name + "\n" + "x" * 10_000) if i == 5 else t for i, t in enumerate(inputs)
    )
    decoder = dataclasses.replace(whole.graphs["decoder"], inputs=inputs)
    with pytest.raises(BundleError, match="among its inputs") as refusal:
        agreement.check(dataclasses.replace(whole, graphs={**whole.graphs, "decoder": decoder}))
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


CHANGES = [
    (("image_tokens",), 100000, "returns 16 features a picture, image_tokens is 100000"),
    (("image_tokens",), 8, "image_tokens is 8"),
    (("groups", 1, "removed"), 1.0, r"groups\[1\] keeps nothing"),
    (("groups", 0, "capacity"), 65, r"groups\[0\].capacity is 65, max_seq_len 64"),
    (("groups", 0, "capacity"), 63, r"past_key_values.0.key float16 \[B, 2, 64, 8\] where its groups need .*63"),
    (("groups", 0, "kv_heads"), 4, "where its groups need"),
    (("groups", 1, "layers"), [2, 3], "groups do not hold every layer once|has .* inputs; its groups need"),
    (("groups", 1, "layers"), [2, 3, 3], "every layer once"),
    (("groups", 0, "source"), "images", "has 18 inputs; its groups need 20"),
    (("groups",), [], "every layer once"),
    (("dims", "W1"), [1, 57], "dims.W1 is not 1 to the capacity of its group, 56"),
    (("dims", "S"), [1, 1000], "dims.S end at max_seq_len or before"),
    (("dims", "N"), [0, 1000], "dims.N reaches 1000, a step has at most 64 tokens"),
    (("dims", "N"), [0, 15], "image_tokens is 16, a step takes 15"),
    (("dims", "B"), [2, 1], "dims.'B' is 2 to 1"),
    (("dims",), {}, "dims has no"),
    (("dims", "R"), [1, 8], "dims.R must begin at 0"),
    (("max_seq_len",), 63, "max_seq_len 63"),
    (("eos_token_ids",), [100], "eos_token_ids holds 100, the decoder returns logits of 100"),
    (("image_grid",), [4, 5], r"image_grid is \[4, 5\]"),
    (("dtype",), "float32", "where its groups need"),
    (("graphs", "decoder", "file"), "../other/decoder.onnx", "expected a plain name"),
    (("graphs", "decoder", "file"), "/etc/passwd", "expected a plain name"),
    (("graphs", "vision", "file"), "decoder.onnx", "two graphs lie in one file"),
    (("graphs", "vision", "file"), "tokenizer.json", "ends in .onnx"),
    (("graphs", "vision", "outputs", 0, "shape"), ["I", 16, 33], "the decoder takes features of width 32"),
    (("graphs", "vision", "outputs", 0, "name"), "features", "must return image_features"),
    (("graphs", "embed", "inputs", 0, "dtype"), "int32", "the embedding does not turn"),
    (("graphs", "embed", "outputs", 0, "shape"), ["B", "S", 31], "the embedding does not turn"),
    (("graphs", "decoder", "outputs", 0, "shape"), ["B", "V"], "no inputs_embeds, position_ids or logits"),
    (("graphs", "decoder", "inputs", 0, "name"), "last_index", "names a tensor twice"),
    (("graphs", "vision", "inputs", 0, "shape"), ["J", 3, 28, 28], "dims has no 'J'"),
    (("graphs", "vision"), None, "graphs has no vision"),
    (("chains",), {"decoder": ["decoder-0"]}, "names a graph that graphs does not have"),
    (("chains",), {"decoder": ["embed"]}, "chains.decoder: embed.onnx: no earlier graph"),
    (("chains",), {"decoder": []}, "chains.decoder names a graph"),
    (("guide",), "bundle", "guide is 'bundle', and the decoder takes no guide_scores"),
]


@pytest.mark.parametrize(("path", "value", "says"), CHANGES, ids=lambda value: str(value)[:40])
def test_one_promise_against_the_others_is_refused(path, value, says):
    raw = json.loads(contract().to_json())
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(BundleError, match=says) as caught:
        agreement.check(Contract.from_json(json.dumps(raw)), "here/contract.json")
    assert str(caught.value).startswith("here/contract.json: ")
    assert "\n" not in str(caught.value)


def test_what_is_removed_gives_no_attention():
    emits = decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=True, emits=True)
    changed = contract()
    changed = dataclasses.replace(changed, graphs={**changed.graphs, "decoder": emits})
    with pytest.raises(BundleError, match="the decoder returns key_scores, and does not hold all visual tokens"):
        agreement.check(changed)


def test_scores_from_outside_have_a_provider():
    guided = decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=True, guided=True)
    changed = contract()
    changed = dataclasses.replace(changed, graphs={**changed.graphs, "decoder": guided})
    agreement.check(dataclasses.replace(changed, guide="bundle"))
    with pytest.raises(BundleError, match="takes guide_scores, and guide does not say who provides them"):
        agreement.check(changed)


def test_removing_without_a_selection_is_refused():
    plain = decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=False)
    changed = contract()
    changed = dataclasses.replace(changed, graphs={**changed.graphs, "decoder": plain})
    with pytest.raises(BundleError, match=r"groups\[1\].removed is 0.5, and the decoder selects nothing"):
        agreement.check(changed)
