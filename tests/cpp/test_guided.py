"""A guide in C++ asks and shows what the Python runtime's does: the same answers, exits, refusals and records."""

import ctypes
import json
import threading
from ctypes import c_double, c_void_p

import pytest
from test_c_interface import SAMPLED, Failed, Native, api, check, python_answer, seeded
from test_tools import run

from vlmtrim import runtime
from vlmtrim.runtime import cli
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture

PICTURES = [generated_picture(seed).resize(size) for seed, size in ((1, (90, 60)), (2, (31, 40)))]


@pytest.fixture
def small(export_tiny):
    return export_tiny("cpp-emitting", method="none", emit_guide=True)


@pytest.fixture
def large(export_tiny):
    return export_tiny("cpp-guided", method="guided")


def guide(native, folder, confidence=0.0):
    model = c_void_p()
    check(api().vlmtrim_model_open(str(folder).encode(), None, ctypes.byref(model)))
    try:
        check(api().vlmtrim_session_guide(native.session, model, c_double(confidence)))
    finally:
        api().vlmtrim_model_close(model)


@pytest.mark.parametrize("sure", [None, 1e-9, 1.0])
def test_guided_answers_are_pythons(sure, small, large):
    native = Native(large)
    guide(native, small, sure or 0.0)
    with runtime.Guided(*(runtime.open(folder, backend="ort-cpu") for folder in (small, large)), sure) as chat:
        for settings in ({"max_new_tokens": 9}, {"max_new_tokens": 9, **SAMPLED}):
            chat.reset("Be brief.")
            native.reset("Be brief.")
            for question, shown in (("What?", PICTURES[:1]), ("And now?", []), ("Here?", PICTURES)):
                expected = python_answer(chat, question, shown, **settings)
                assert native.generate([*shown, question], **seeded(settings)) == expected
                answer, told = native.answer, chat.guidance
                assert answer.guided == (told is not None)
                if told is not None:
                    assert answer.exited == told.exited == (sure == 1e-9)
                    assert answer.confidence == pytest.approx(told.confidence, rel=1e-12)
                    assert answer.guide_seconds > 0 and (answer.guided_seconds > 0) == (not told.exited)
    native.close()


def test_an_answer_of_the_guide_is_told_as_far_as_it_is_heard(small, large):
    native, heard = Native(large), []
    guide(native, small, 1e-9)

    def listen(_, token):
        heard.append(token)
        return len(heard) == 3

    text, tokens, ended, visual, kept = native.generate([PICTURES[0], "What?"], listen, max_new_tokens=9)
    assert (tokens, ended, visual, kept) == (heard, "cancelled", 16, 16) and len(heard) == 3
    whole = native.generate([PICTURES[0], "What?"], max_new_tokens=9)
    assert whole[0].startswith(text) and whole[1][:3] == heard and whole[2] == "length"
    native.close()


def test_a_cancelled_guide_ends_the_question(small, large):
    native, done = Native(large), threading.Event()
    guide(native, small)

    def cancel():
        while not done.wait(1e-3):
            api().vlmtrim_cancel(native.session)

    thread = threading.Thread(target=cancel)
    thread.start()
    _, tokens, ended, visual, kept = native.generate([PICTURES[0], "What?"], max_new_tokens=300)
    done.set()
    thread.join()
    assert (ended, visual, kept) == ("cancelled", 16, 16) and 0 < len(tokens) < 300
    assert native.answer.exited and native.answer.guided_seconds == 0
    native.close()


def test_bundles_that_do_not_fit_together_are_refused_as_in_python(small, large, fastv_bundle):
    for guiding, guided in ((fastv_bundle, large), (small, fastv_bundle)):
        native = Native(guided)
        with pytest.raises(RuntimeRefusal) as expected:
            runtime.Guided(runtime.open(guiding), runtime.open(guided))
        with pytest.raises(Failed) as found:
            guide(native, guiding)
        assert str(found.value) == f"2: {expected.value}"
        native.close()
    native = Native(large)
    with pytest.raises(Failed, match="exit_confidence is 2; give a probability above 0, at most 1"):
        guide(native, small, 2.0)
    guide(native, small)
    with pytest.raises(Failed, match="the session has a guide already"):
        guide(native, small)
    with pytest.raises(Failed, match="a session with a guide takes words; give no token ids"):
        native.generate([], ids=[3, 4])
    native.close()


@pytest.mark.parametrize("more", [[], ["--exit-confidence", "0.000001"]])
def test_the_record_is_run_vlms(more, small, large, tmp_path, capsys):
    PICTURES[0].save(tmp_path / "a.png")
    asked = ["--guide", str(small), "--image", str(tmp_path / "a.png"), "--prompt", "What?", "--max-new-tokens", "5"]
    assert cli.main([str(large), *asked, *more, "--json", "--backend", "ort-cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    found = json.loads(run("vlmtrim-run", large, *asked, *more, "--json").stdout)
    for record in (expected, found):
        assert all(value >= 0 for value in record.pop("times").values()) and record["guide"].pop("small") > 0
        assert (record["guide"].pop("large") > 0) == (not more)
    assert found["guide"].pop("confidence") == pytest.approx(expected["guide"].pop("confidence"), abs=2e-6)
    assert found == expected
    said = run("vlmtrim-run", large, *asked, *more).stderr
    assert f"guide {small}: confidence 0." in said and ("its answer" if more else "guided ") in said
    refused = run("vlmtrim-run", large, *asked[2:], "--exit-confidence", "0.5")
    assert refused.returncode == 2 and "give --guide SMALL as well" in refused.stderr
