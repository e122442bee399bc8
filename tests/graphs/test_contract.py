"""contract.py: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import (
    DTYPE_BYTES,
    CacheGroup,
    Contract,
    GraphSpec,
    TensorSpec,
    cache_names,
    kept_count,
)
from vlmtrim.graphs.reading import BundleError

GROUPS = (CacheGroup((0, 1), 64, 2, 8), CacheGroup((2, 3, 4), 56, 2, 8, removed=0.5))


def make_contract(**changes) -> Contract:
    decoder = decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=True)
    embed = GraphSpec(
        "embed.onnx",
        (
            TensorSpec("input_ids", "int64", ("B", "S")),
            TensorSpec("image_features", "float16", ("B", "N", 32)),
            TensorSpec("visual_positions", "int64", ("B", "N")),
        ),
        (TensorSpec("inputs_embeds", "float16", ("B", "S", 32)),),
    )
    vision = GraphSpec(
        "vision.onnx",
        (TensorSpec("pixel_values", "float16", ("I", 3, 28, 28)),),
        (TensorSpec("image_features", "float16", ("I", 16, 32)),),
    )
    contract = Contract(
        family="llava",
        dtype="float16",
        graphs={"vision": vision, "embed": embed, "decoder": decoder},
        groups=GROUPS,
        dims={"I": (1, 6), "B": (1, 2), "S": (1, 64), "N": (0, 48), "W0": (1, 64), "W1": (1, 56)},
        selection={"method": "fastv", "k": 2, "r": 0.5},
        max_seq_len=64,
        images_assumed=1,
        image_tokens=16,
        image_token_id=99,
        eos_token_ids=(2, 3),
    )
    return dataclasses.replace(contract, **changes)


@pytest.mark.parametrize("changes", [{}, {"selection": None}, {"eos_token_ids": ()}])
def test_json_round_trip_returns_an_equal_contract(changes):
    contract = make_contract(**changes)
    again = Contract.from_json(contract.to_json())
    assert again == contract
    assert again.to_json() == contract.to_json()


@pytest.mark.parametrize("schema", [0, 1, 99, "2", None])
def test_unknown_schema_is_refused_with_what_was_given_and_what_to_do(schema):
    raw = json.loads(make_contract().to_json())
    raw["schema"] = schema
    with pytest.raises(ValueError, match="schema") as caught:
        Contract.from_json(json.dumps(raw))
    assert repr(schema) in str(caught.value)
    assert "export the model again" in str(caught.value)


def test_an_older_bundle_is_refused_with_the_command_that_makes_it_again():
    raw = {
        "schema": 1,
        "selection": {"method": "fastv", "k": 2, "r": 0.5, "score": "no-rope", "x y": "$(rm)", "z": "a b"},
    }
    with pytest.raises(
        ValueError, match=r"--model MODEL --method fastv --k 2 --r 0\.5 --score no-rope, MODEL as"
    ) as caught:
        Contract.from_json(json.dumps(raw))
    assert "rm" not in str(caught.value) and "a b" not in str(caught.value)
    with pytest.raises(ValueError, match="--method none"):
        Contract.from_json(json.dumps({"schema": 1, "selection": None}))


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1', "\x00\x01", "[]", "3", "null", '"contract"', "{}"])
def test_what_is_no_contract_is_refused_with_a_value_error(text):
    with pytest.raises(ValueError) as caught:
        Contract.from_json(text)
    assert str(caught.value).strip()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["graphs", "groups", "dims", "eos_token_ids", "family", "max_seq_len"])
def test_a_missing_field_is_refused_as_no_contract(key):
    raw = json.loads(make_contract().to_json())
    del raw[key]
    with pytest.raises(BundleError, match=f"contract.json has no {key}"):
        Contract.from_json(json.dumps(raw))


def test_an_unknown_field_is_refused():
    raw = json.loads(make_contract().to_json())
    raw["surprise"] = 1
    with pytest.raises(ValueError, match="surprise"):
        Contract.from_json(json.dumps(raw))


@pytest.mark.parametrize("key", ["groups", "dims", "graphs"])
def test_a_field_of_the_wrong_type_is_refused(key):
    raw = json.loads(make_contract().to_json())
    raw[key] = 5
    with pytest.raises(BundleError, match=f"contract.json: {key} is 5; expected"):
        Contract.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("groups", 1, "removed"), -5, r"groups\[1\].removed is -5; expected a number from 0 to 1"),
        (("groups", 1, "removed"), float("nan"), "NaN is no number"),
        (("groups", 0, "capacity"), 0, r"groups\[0\].capacity is 0; expected an integer from 1"),
        (("groups", 0, "capacity"), 10**400, "an integer of 1329 bits; expected an integer"),
        (("groups", 0, "layers"), [1, True], r"layers\[1\] is True; expected an integer"),
        (("groups", 0, "layers"), "01", "layers is '01'; expected a list"),
        (("groups", 0, "source"), "air", "source is 'air'; expected one of tokens, images"),
        (("graphs", "decoder", "inputs", 0, "dtype"), "float8", "dtype is 'float8'; expected one of float32"),
        (("graphs", "decoder", "inputs", 0, "shape"), ["B", -1], r"shape\[1\] is -1"),
        (("graphs", "decoder", "inputs", 0, "shape"), ["B", 1.5], r"shape\[1\] is 1.5"),
        (("graphs", "decoder", "file"), None, "file is None; expected a text"),
        (("dims", "B"), [1], "dims.B has 1 entries; expected 2"),
        (("dims", "B"), [1, 2**31], r"dims.B\[1\] is 2147483648; expected an integer from 0 to 2147483647"),
        (("image_tokens",), 0, "image_tokens is 0; expected an integer from 1"),
        (("image_grid",), [0, 3], r"image_grid\[0\] is 0"),
        (("eos_token_ids",), [-1], r"eos_token_ids\[0\] is -1"),
        (("macs",), {"token": 1}, "macs has no logits"),
        (("selection",), "fastv", "selection is 'fastv'; expected an object"),
        (("family",), "x" * 5000, "expected a text of at most 4096"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_its_place(path, value, says):
    raw = json.loads(make_contract().to_json())
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(BundleError, match=says) as caught:
        Contract.from_json(json.dumps(raw))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# round(tokens * (1 - removed)), halves to even, written out by hand
@pytest.mark.parametrize(
    ("tokens", "removed", "expected"),
    [
        (576, 0.5, 288),
        (576, 0.75, 144),
        (576, 0.0, 576),
        (0, 0.5, 0),
        (1, 0.5, 0),
        (3, 0.5, 2),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (9, 0.5, 4),
        (2, 0.75, 0),
        (6, 0.75, 2),
        (10, 0.75, 2),
        (14, 0.75, 4),
        (6, 0.25, 4),
        (2, 0.25, 2),
        (10, 0.25, 8),
        (16, 0.9375, 1),
    ],
)
def test_kept_count_rounds_halves_to_even(tokens, removed, expected):
    assert kept_count(tokens, removed) == expected


@given(st.integers(0, 5000), st.integers(0, 63))
def test_kept_count_is_exact_rounding_where_the_share_is_a_dyadic_fraction(tokens, share):
    assert kept_count(tokens, share / 64) == round(Fraction(tokens) * (1 - Fraction(share, 64)))


@given(st.integers(0, 5000), st.floats(0, 0.999))
def test_kept_count_lies_between_nothing_and_all_and_within_a_half(tokens, removed):
    kept = kept_count(tokens, removed)
    assert 0 <= kept <= tokens
    assert abs(kept - tokens * (1 - removed)) <= 0.5 + 1e-9


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_group_bytes_are_keys_and_values_of_every_layer(dtype, width):
    one_tensor = 3 * 2 * 56 * 8 * width  # batch, heads, capacity, head size
    assert CacheGroup((2, 3, 4), 56, 2, 8, 0.5).nbytes(3, dtype) == 3 * (one_tensor + one_tensor)


def test_dtype_widths_are_numpys():
    import numpy as np

    assert all(np.dtype(name).itemsize == width for name, width in DTYPE_BYTES.items() if name != "bfloat16")
    assert DTYPE_BYTES["bfloat16"] == 2


@pytest.mark.parametrize(
    ("removed", "tokens", "visual", "expected"),
    [(0.0, 40, 16, 40), (0.5, 40, 16, 32), (0.75, 40, 16, 28), (0.75, 1, 0, 1), (0.5, 5, 5, 2), (0.5, 0, 0, 0)],
)
def test_group_length_counts_text_and_kept_visual_tokens(removed, tokens, visual, expected):
    assert CacheGroup((0,), 64, 2, 8, removed).length(tokens, visual) == expected


def test_removed_is_that_of_the_last_group():
    assert make_contract().removed == 0.5
    assert make_contract(groups=GROUPS[:1]).removed == 0.0


def test_max_images_is_what_fits_into_one_step():
    assert make_contract().max_images == 3


def test_decoder_boundary_names_every_cache_once_and_selection_inputs_only_where_it_selects():
    for selects in (True, False):
        spec = decoder_spec(dtype="float16", hidden=32, vocabulary=100, groups=GROUPS, selects=selects)
        inputs, outputs = [t.name for t in spec.inputs], [t.name for t in spec.outputs]
        assert len(set(inputs)) == len(inputs)
        assert len(set(outputs)) == len(outputs)
        assert ("visual_positions" in inputs) == ("kept_indices" in outputs) == selects
        for layer in range(5):
            for past, present in cache_names(layer):
                assert past in inputs
                assert present in outputs
        shapes = {t.name: t.shape for t in spec.inputs}
        assert shapes["past_key_values.1.key"] == ("B", 2, 64, 8)
        assert shapes["past_key_values.2.value"] == ("B", 2, 56, 8)
        assert shapes["key_positions.1"] == ("W1",)
