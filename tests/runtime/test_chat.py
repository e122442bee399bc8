"""generate.py: prompts of parts, stop texts, and who may use a conversation when."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtrim import runtime
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.stopping import Stopper


@pytest.fixture
def chat(fastv_bundle):
    with runtime.open(fastv_bundle) as opened:
        yield opened


def answer(chat, *args, **kwargs) -> list[int]:
    return [step.token_ids[0] for step in chat.generate(*args, max_new_tokens=6, **kwargs)]


def test_a_prompt_of_parts_equals_the_template_where_the_order_is_the_same(chat, picture):
    """The tiny template writes pictures first, then words."""
    plain = answer(chat, "What is it?", [picture])
    chat.reset()
    assert answer(chat, runtime.Prompt(runtime.Image(picture), "What is it?")) == plain
    chat.reset()
    assert answer(chat, "What is it?", picture) == plain  # one picture needs no list


def test_a_picture_between_words_is_seen_between_them(chat, picture):
    """Though the tiny template, as LLaVA's, writes pictures first."""
    parts = runtime.Prompt("left ", runtime.Image(picture), " right")
    places = next(iter(chat.generate(parts))).prefill.visual_positions[0]
    start = len("<USER: left ")  # the start token, then a token for each byte
    assert places.tolist() == list(range(start, start + 16))


def test_pictures_that_do_not_fit_the_prompt_are_refused(chat, picture):
    parts = runtime.Prompt("What", runtime.Image(picture))
    with pytest.raises(RuntimeRefusal, match="has its pictures among its parts"):
        chat.generate(parts, [picture])
    with pytest.raises(RuntimeRefusal, match="part of a prompt is of type int"):
        runtime.Prompt("a", 3)  # type: ignore[arg-type]
    with pytest.raises(RuntimeRefusal, match="a prompt is of type int"):
        chat.generate([3])
    with pytest.raises(RuntimeRefusal, match="pictures are given as int"):
        chat.generate("a", 3)
    for empty in ("", "  \n", runtime.Prompt()):
        with pytest.raises(RuntimeRefusal, match="the prompt is empty"):
            chat.generate(empty)
    assert answer(chat, "", [picture])


def test_reset_ends_the_answer_that_is_still_held(chat):
    """Finding 10: the old answer went on in the new conversation."""
    held = chat.generate("Tell me", max_new_tokens=20)
    next(held)
    chat.reset()
    assert list(held) == []
    fresh = answer(chat, "Tell me")
    chat.reset()
    assert answer(chat, "Tell me") == fresh


def test_another_thread_is_refused_while_an_answer_runs(chat):
    """Finding 25."""
    held = chat.generate("Tell me", max_new_tokens=20)
    next(held)
    refusals = []

    def intrude() -> None:
        for use in (lambda: chat.generate("And me"), chat.reset, chat.close):
            try:
                use()
            except RuntimeRefusal as refusal:
                refusals.append(str(refusal))

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(refusals) == 3 and all("another thread" in said for said in refusals)
    assert len(list(held)) > 0  # and the answer goes on


def test_threads_at_once_get_answers_or_refusals(fastv_bundle):
    with runtime.open(fastv_bundle) as chat:
        expected = answer(chat, "Tell me")
        outcomes: list[object] = []

        def ask() -> None:
            for _ in range(6):
                try:
                    chat.reset()
                    outcomes.append(answer(chat, "Tell me"))
                except RuntimeRefusal as refusal:
                    outcomes.append(str(refusal))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers = [outcome for outcome in outcomes if isinstance(outcome, list)]
        assert len(outcomes) == 24 and answers and all(found in (expected, []) for found in answers)


def test_a_closed_conversation_refuses_everything(fastv_bundle):
    chat = runtime.open(fastv_bundle)
    held = chat.generate("Tell me", max_new_tokens=20)
    next(held)
    chat.close()
    assert list(held) == []
    for use in (lambda: chat.generate("And now"), chat.reset, lambda: chat.session.decode(np.array([1]))):
        with pytest.raises(RuntimeRefusal, match="the session is closed"):
            use()
    chat.close()  # twice is once


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_opening_and_closing_leaves_memory_flat(fastv_bundle, picture, count):
    """Finding 26."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    def cycles(count: int) -> None:
        for _ in range(count):
            with runtime.open(fastv_bundle) as chat:
                list(chat.generate("What?", [picture], max_new_tokens=1))

    cycles(8)
    before = resident()
    cycles(count)
    assert resident() - before < 8e6  # a session that stays is more: 5 MB of weights, and its arenas


@pytest.mark.parametrize("logits", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(chat, monkeypatch, logits, temperature):
    """Finding 15: an empty answer, or a traceback."""
    real = chat.session.backend.to_host
    monkeypatch.setattr(chat.session.backend, "to_host", lambda t: real(t) * np.float32(logits))
    with pytest.raises(RuntimeRefusal, match="returned NaN"):
        list(chat.generate("a", sampling=runtime.Sampling(temperature=temperature)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 50, 1e300])
def test_any_temperature_draws_tokens(chat, temperature):
    sampling = runtime.Sampling(temperature=temperature, seed=1)
    steps = list(chat.generate("Tell me", max_new_tokens=24, sampling=sampling))
    assert steps and all(isinstance(step.text, str) for step in steps)


def test_an_answer_ends_before_its_stop_text(fastv_bundle):
    with runtime.open(fastv_bundle) as chat:
        whole = "".join(step.text for step in chat.generate("Tell me", max_new_tokens=24))
        at = len(whole) // 2
        stop = whole[at : at + 2]
        chat.reset()
        steps = list(chat.generate("Tell me", max_new_tokens=24, stop=[stop, "never said at all"]))
    assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
    assert steps[-1].ended == ("stop",) and len(steps) <= 24


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_texts_are_found_as_in_the_whole_text(pieces, stops):
    stopper, said = Stopper(stops), ""
    for index, piece in enumerate(pieces):
        text, stopped = stopper.take(piece, last=index == len(pieces) - 1)
        said += text
        if stopped:
            break
    whole = "".join(pieces)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    if cuts:
        # as soon as any stop text is complete: the earliest of those that are complete then
        assert not any(stop in said for stop in stops) and whole.startswith(said)
    else:
        assert said == whole


@pytest.mark.parametrize("stop", ["", [""], [3]])
def test_a_stop_text_that_is_none_is_refused(chat, stop):
    if stop == "":
        stop = [""]
    with pytest.raises(RuntimeRefusal, match="a stop text is"):
        chat.generate("a", stop=stop)
