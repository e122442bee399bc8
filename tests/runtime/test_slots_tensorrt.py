"""Slots on a fake GPU: rows of the caches are bound by address, and a row that moves is copied there."""

import pytest
from alone import answer_alone, assert_same
from fake_machine import Machine

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import Engine, Image, Message, Prompt, Sampling
from vlmtrim.runtime.backends import tensorrt
from vlmtrim.runtime.image import generated_picture

BUNDLES = {
    "whole": {"k": 2, "r": 0.5, "max_batch": 3},
    "chain": {"k": 2, "r": 0.5, "engine": "tensorrt-rtx", "engine_shards": 2, "max_batch": 3},
    "crossing": {"family": "mllama", "method": "trimmed-llama", "max_batch": 3, "images": 2},
}


@pytest.mark.parametrize("name", BUNDLES)
def test_answers_are_those_of_ort_cpu_alone(export_tiny, monkeypatch, tmp_path, name):
    """Five requests on three slots, with and without pictures, of different lengths; greedy and seeded."""
    folder = export_tiny("slots", **BUNDLES[name])  # before the libraries are fakes
    machine = Machine(monkeypatch, tmp_path / "home")
    alone = runtime.Session(open_bundle(folder), runtime.make_backend("ort-cpu", threads=1))
    bundle = open_bundle(machine.with_engines(folder, tmp_path / "bundle"))
    with Engine(bundle, tensorrt.TrtBackend("tensorrt"), queue=8) as engine:
        requests = []
        for number, (pictures, tokens) in enumerate([(1, 3), (0, 12), (2, 9), (1, 6), (0, 2)]):
            shown = [Image(generated_picture(seed)) for seed in range(pictures)]
            sampling = Sampling(temperature=1.0, seed=number) if number % 2 else Sampling()
            asked = [Message("user", Prompt("What is it? " * number + "Tell", *shown))]
            requests.append(engine.prepare(asked, max_new_tokens=tokens, sampling=sampling))
        answers = [engine.submit(request) for request in requests]
        heard = [list(answer) for answer in answers]
        state = engine.state()
    for request, tokens in zip(requests, heard, strict=True):
        assert_same(tokens, answer_alone(alone, request))
    assert (state.finished, state.live, state.waiting, state.failed) == (5, 0, 0, 0)
    assert state.moves > 0 and state.rows > state.steps
