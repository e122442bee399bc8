"""Fields of a request: what is taken, what is accepted without effect, what is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.serve import schema
from vlmtrim.runtime.serve.errors import ApiError

QUESTION = {"messages": [{"role": "user", "content": "What?"}]}


def read(**fields) -> schema.Ask:
    return schema.read(json.dumps(QUESTION | fields).encode(), 1000)


def refused(body: bytes | None = None, **fields) -> ApiError:
    with pytest.raises(ApiError) as caught:
        schema.read(json.dumps(QUESTION | fields).encode() if body is None else body, 1000)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_greedy_whole_and_unlimited():
    ask = read()
    assert ask.sampling == Sampling() and ask.max_new_tokens is None and ask.stop == ()
    assert not (ask.stream or ask.include_usage or ask.show_kept) and ask.top_logprobs is None


def test_the_newer_limit_wins():
    assert read(max_tokens=5).max_new_tokens == 5
    assert read(max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert read(max_tokens=5, max_completion_tokens=None).max_new_tokens == 5


def test_supported_fields_reach_the_engine():
    ask = read(temperature=0.5, top_p=0.9, top_k=4, seed=7, stop=["a", "b"], logprobs=True, top_logprobs=20)
    assert ask.sampling == Sampling(0.5, 4, 0.9, 7)
    assert ask.stop == ("a", "b") and read(stop="a").stop == ("a",) and ask.top_logprobs == 20
    assert read(logprobs=True).top_logprobs == 0
    ask = read(stream=True, stream_options={"include_usage": True}, vlmtrim={"show_kept": True})
    assert ask.stream and ask.include_usage and ask.show_kept


@pytest.mark.parametrize("name", schema.HARMLESS)
def test_harmless_fields_are_accepted(name):
    read(**{name: "x"})
    read(**{name: {"a": [1]}})


@pytest.mark.parametrize("name", schema.NEUTRAL)
def test_unsupported_fields_are_refused_by_name_unless_they_ask_for_nothing(name):
    for value in (None, *schema.NEUTRAL[name]):
        read(**{name: value})
    for value in (2, 0.5, True, "x", ["x"], {"x": 1}):
        error = refused(**{name: value})
        assert error.param == name and str(error).startswith(name) and error.code == "unsupported_parameter"


@pytest.mark.parametrize("name", ["n_discard", "lora_name", "prompt_embeds", "slot_id", "Messages", "best_of"])
def test_unknown_fields_are_refused_by_name(name):
    """Requirement 16: no tensors, paths or LoRA names."""
    error = refused(**{name: -5})
    assert error.param == name and name in str(error) and error.code == "unknown_parameter"
    assert "\n" not in str(refused(**{"a\nb": 1})) and len(str(refused(**{"x" * 9999: 1}))) < 300


RANGES = {
    "max_tokens": (1, schema.LARGEST),
    "max_completion_tokens": (1, schema.LARGEST),
    "top_k": (0, schema.LARGEST),
    "seed": (0, schema.LARGEST_SEED),
    "temperature": (0, 2),
    "top_p": (0.001, 1),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_refused(name):
    """Requirement 16: before anything is computed with them."""
    low, high = RANGES[name]
    for value in (low, high):
        read(**{name: value})
    for value in (low - 1, high + 1, -(2**63), 2**64, 10**400, True, "1", [1], {}):
        error = refused(**{name: value})
        assert error.param == name and len(str(error)) < 150
    if isinstance(low, int) and name != "temperature":
        refused(**{name: 1.5})
    refused(f'{{"messages": [], "{name}": NaN}}'.encode())
    refused(f'{{"messages": [], "{name}": 1e999}}'.encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"n": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"vlmtrim": {"path": "/etc"}}, "vlmtrim"),
        ({"model": 3}, "model"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, param):
    assert refused(**fields).param == param


def turn(role, content="x", **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        ["x"],
        [{}],
        [turn("tool")],
        [turn(["user"])],
        [turn("user", None)],
        [turn("user", [])],
        [turn("user", [3])],
        [turn("user", [{"type": "text"}])],
        [turn("user", [{"type": "input_audio", "input_audio": {}}])],
        [turn("user", [{"type": "video_url", "video_url": {"url": "data:"}}])],
        [turn("user", [{"type": "image_url"}])],
        [turn("user", [{"type": "image_url", "image_url": {"url": 3}}])],
        [turn("user", path="/etc/passwd")],
        [turn("assistant")],
        [turn("user"), turn("assistant")],
        [turn("user"), turn("system"), turn("user")],
        [turn("user"), turn("assistant", [{"type": "image_url", "image_url": {"url": "data:"}}]), turn("user")],
        [turn("user"), turn("assistant", tool_calls=[{"id": "1"}]), turn("user")],
        [turn("user")] * 1001,
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages):
    assert refused(messages=messages).param.startswith("messages")


def test_a_conversation():
    system = turn("developer", [{"type": "text", "text": "Be "}, {"type": "text", "text": "short"}])
    said = turn("assistant", "sun", refusal=None, tool_calls=[])
    ask = read(messages=[system, turn("user", name="a"), said, turn("user", "and?")])
    assert [t.role for t in ask.turns] == ["system", "user", "assistant", "user"]
    assert ask.turns[0].parts == ("Be ", "short")


def test_bodies_that_are_no_object_are_refused():
    for body in (b"", b"{", b"[]", b"3", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 9999):
        assert refused(body).code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*schema.SUPPORTED, *schema.NEUTRAL, *schema.HARMLESS, "role", "content", "type", "text"])


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=4), st.booleans())
def test_whatever_comes_is_an_ask_or_a_refusal(fields, question):
    """Never another error."""
    try:
        schema.read(json.dumps((QUESTION if question else {}) | fields).encode(), 1000)
    except ApiError as error:
        assert error.status == 400 and "\n" not in str(error)
