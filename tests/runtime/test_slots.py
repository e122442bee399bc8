"""Several conversations at once: each answer is the one that its request gets alone, whatever runs beside it."""

from __future__ import annotations

import time

import pytest
from alone import answer_alone, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.caches import load_policy
from vlmtrim.runtime import Engine, Image, Message, Prompt, Sampling
from vlmtrim.runtime.image import generated_picture

SLOTS = 3
ANY_SIZE = {"max_seq_len": 1024, "image_tokens": 0, "images": 3}
BUNDLES = {
    "llava fastv": {"k": 2, "r": 0.5},
    "llava none": {"method": "none"},
    "llava zipvl": {"method": "zipvl"},
    "llava pyramid": {"method": "pyramid"},
    "llava tidal": {"method": "tidal", "entries": 9, "selecting": (0, 2)},
    "llava_next fastv": {"family": "llava_next", **ANY_SIZE},
    "qwen2_5_vl fastv": {"family": "qwen2_5_vl", **ANY_SIZE},
    "gemma3 fastv": {"family": "gemma3"},
    "mllama trimmed-llama": {"family": "mllama", "method": "trimmed-llama", "images": 3},
    "snapkv": {"cache": load_policy("snapkv")(), "cache_share": 0.4},
    "keyformer, every 3": {"method": "none", "cache": load_policy("keyformer")(every=3, rise=0.1), "cache_share": 0.5},
    "scope": {"method": "none", "cache": load_policy("scope")(), "cache_share": 0.5},
    "elastic, a ring of 5": {"method": "none", "cache": load_policy("elastic")(evict=5), "cache_share": 0.4},
}


@pytest.fixture(scope="module")
def opened(export_tiny):
    """opened(name) -> (an engine, a session of one row), each opened once."""
    made = {}

    def give(name):
        if name not in made:
            bundle = open_bundle(export_tiny("slots", max_batch=SLOTS, **BUNDLES[name]))
            engine = Engine(bundle, runtime.make_backend("ort-cpu", threads=1), queue=64)
            made[name] = engine, runtime.Session(bundle, runtime.make_backend("ort-cpu", threads=1))
        return made[name]

    yield give
    for engine, session in made.values():
        engine.close()
        session.close()


texts = st.text("ab c<>éß", max_size=24).map(lambda text: "Tell " + text)
sizes = st.tuples(st.integers(20, 120), st.integers(20, 120))
samplings = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        st.sampled_from([0.7, 1.0, 2.0]),
        st.sampled_from([0, 20]),
        st.sampled_from([0.9, 1]),
        st.integers(0, 99),
    ),
)


@st.composite
def arrivals(draw):
    """A request of one or two turns; how many tokens the engine says before it comes; when it is cancelled, if so."""
    turns = []
    for _ in range(draw(st.integers(1, 2))):
        pictures = [
            Image(generated_picture(seed).resize(size))
            for seed, size in enumerate(draw(st.lists(sizes, max_size=1 if turns else 3)))
        ]
        turns += [Message("user", Prompt(draw(texts), *pictures)), Message("assistant", draw(texts))]
    asked = {
        "max_new_tokens": draw(st.integers(1, 14)),
        "sampling": draw(samplings),
        "stop": tuple(draw(st.lists(st.text("ab ", min_size=1, max_size=1), max_size=1))),
        "top_logprobs": draw(st.sampled_from([None, 0, 2])),
    }
    cancel = draw(st.one_of(st.none(), st.none(), st.integers(0, 6)))
    return turns[:-1], asked, draw(st.integers(0, 9)), cancel


def run(engine, scenario):
    """Submit as the scenario says; (request, heard tokens, whether it was cancelled) of each that fits."""
    answers = []
    for messages, asked, after, cancel in scenario:
        try:
            request = engine.prepare(messages, **asked)
        except runtime.RuntimeRefusal:  # what does not fit is for other tests
            continue
        due, state = engine.state().generated_tokens + after, engine.state()
        while state.live + state.waiting and state.generated_tokens < due:
            time.sleep(0.0005)
            state = engine.state()
        answers.append((request, engine.submit(request), cancel))
    heard = []
    for request, answer, cancel in answers:
        tokens = []
        for token in answer:
            tokens.append(token)
            if len(tokens) - 1 == cancel:
                answer.cancel()
        heard.append((request, tokens, cancel is not None))
    return heard


def holds(opened, name, scenario):
    engine, session = opened(name)
    for request, tokens, cancelled in run(engine, scenario):
        assert_same(tokens, answer_alone(session, request), cancelled)
    state = engine.state()
    assert (state.live, state.waiting, state.failed, state.cache_usage) == (0, 0, 0, 0.0)


OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.mark.parametrize("name", BUNDLES)
@settings(max_examples=6, **OPTIONS)
@given(scenario=st.lists(arrivals(), min_size=3, max_size=7))
def test_every_answer_equals_that_of_its_request_alone(opened, name, scenario):
    """Any arrival order, 0 to 4 pictures of any size, greedy and seeded, stop texts, cancels; rows move down."""
    holds(opened, name, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLES)
@settings(max_examples=150, **OPTIONS)
@given(scenario=st.lists(arrivals(), min_size=3, max_size=12))
def test_every_answer_equals_that_of_its_request_alone_at_length(opened, name, scenario):
    holds(opened, name, scenario)
