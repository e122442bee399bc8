"""A bundle guided by another: scores at the boundary of a session."""

import json

import numpy as np
import pytest

from vlmtrim import runtime
from vlmtrim.runtime import chat_cli, cli
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image
from vlmtrim.runtime.processors.base import Pictures


@pytest.fixture(scope="module")
def guided_bundle(export_tiny):
    return export_tiny("parity", method="guided", max_batch=2)


@pytest.fixture(scope="module")
def guide_bundle(export_tiny):
    return export_tiny("emitting", method="none", emit_guide=True, max_batch=2)


@pytest.fixture
def pair(guide_bundle, guided_bundle):
    """Function of the exit confidence."""
    return lambda sure=None: runtime.Guided(runtime.open(guide_bundle), runtime.open(guided_bundle), sure)


def prefill(chat, picture, guide):
    session = chat.session
    return session.prefill([[256, *[259] * 16, 40, 41]], session.processor([load_image(picture)]), guide)


def test_what_it_is_given_is_what_it_ranks_by(guided_bundle, picture):
    with runtime.open(guided_bundle) as chat:
        scores = np.random.default_rng(0).random((1, 16), dtype=np.float32)
        found = prefill(chat, picture, scores)
        np.testing.assert_array_equal(found.visual_scores, scores)
        assert np.flatnonzero(found.survivors(0)).tolist() == sorted(np.argsort(-scores[0])[:4].tolist())
        chat.reset()
        assert list(chat.generate("What is it?", max_new_tokens=2))[-1].index == 1  # no picture, no scores


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (None, "none are given: run-vlm with --guide SMALL"),
        (np.zeros((1, 15), np.float32), r"guide is float32 \[1, 15\]; give finite float32 \[1, 16\]"),
        (np.zeros((1, 16)), "guide is float64"),
        (np.full((1, 16), np.nan, np.float32), "give finite"),
    ],
)
def test_scores_that_are_missing_or_do_not_fit_are_refused(guided_bundle, picture, guide, says):
    with runtime.open(guided_bundle) as chat, pytest.raises(RuntimeRefusal, match=says):
        prefill(chat, picture, guide)


def test_a_bundle_that_ranks_by_itself_takes_none(fastv_bundle, picture):
    with runtime.open(fastv_bundle) as chat, pytest.raises(RuntimeRefusal, match="leave guide out"):
        prefill(chat, picture, np.zeros((1, 16), np.float32))


def test_the_large_bundle_keeps_what_the_small_one_looked_at(pair, picture, guide_bundle):
    """The scores are the small one's sums over its whole answer; confidence is what its logits say."""
    with pair() as both:
        steps = list(both.generate("What is it?", [picture], max_new_tokens=4))
        with runtime.open(guide_bundle) as alone:
            logits, decode = [], alone.session.decode
            alone.session.decode = lambda *args: logits.append(decode(*args)) or logits[-1]
            alone.session.attention.on = True
            first, *_ = alone.generate("What is it?", [picture], max_new_tokens=4)
            received = alone.session.attention.received
        np.testing.assert_array_equal(steps[0].prefill.visual_scores, received)
        assert steps[0].prefill.kept == 4 and not both.guidance.exited and both.session is both.large.session
        best = [np.exp(row[0] - np.log(np.exp(row[0]).sum())).max() for row in (first.prefill.logits, *logits)]
        assert len(best) == 4 and both.guidance.confidence == pytest.approx(np.prod(best) ** 0.25, rel=1e-4)
        assert both.guidance.small > 0 and both.guidance.large > 0
        before = both.large.session.lengths.positions[0]
        follow_up = list(both.generate("Sure?", max_new_tokens=2))
        assert both.guidance is None and follow_up[-1].index == 1
        assert both.large.session.lengths.positions[0] > before  # the large one's conversation goes on


def test_where_the_small_bundle_is_sure_its_answer_is_given(pair, picture, guide_bundle):
    with runtime.open(guide_bundle) as alone:
        expected = [step.token_ids for step in alone.generate("What is it?", [picture], max_new_tokens=4)]
    with pair(1e-6) as both:
        for _ in range(2):  # each question opens a conversation
            assert [s.token_ids for s in both.generate("What is it?", [picture], max_new_tokens=4)] == expected
            assert both.guidance.exited and both.session is both.small.session
        assert both.large.session.lengths.positions[0] == 0
        list(both.generate("What?", max_new_tokens=1))
        assert both.session is both.large.session
    with pair(1.0) as both:
        list(both.generate(runtime.Prompt("Is ", runtime.Image(picture), " it?"), max_new_tokens=2))
        assert not both.guidance.exited


def test_bundles_that_do_not_fit_together_are_refused(pair, picture, guide_bundle, guided_bundle, fastv_bundle):
    small, large, plain = (runtime.open(folder) for folder in (guide_bundle, guided_bundle, fastv_bundle))
    with pytest.raises(RuntimeRefusal, match="bundle does not return its attention; export the guide with"):
        runtime.Guided(plain, large)
    with pytest.raises(RuntimeRefusal, match="bundle takes no scores of a guide; export it with --method guided"):
        runtime.Guided(small, plain)
    with pytest.raises(RuntimeRefusal, match="exit_confidence is 2"):
        runtime.Guided(small, large, 2)
    both = runtime.Guided(small, large)
    object.__setattr__(small.session.contract, "image_tokens", 15)
    with pytest.raises(RuntimeRefusal, match=r"bundle has image_tokens 15, .*bundle 16; a guide must see the same"):
        runtime.Guided(small, large)
    object.__setattr__(small.session.contract, "image_tokens", 16)
    processor = small.session.processor
    small.session.processor = lambda images: Pictures(processor(images).inputs, (9,))
    with pytest.raises(RuntimeRefusal, match=r"bundle makes \[9\] visual tokens of the pictures, .*bundle \[16\]"):
        both.generate("What?", [picture])
    with pytest.raises(RuntimeRefusal, match="export it with --method none --emit-guide"):
        plain.session.attention.on = True


def test_run_vlm_tells_what_became_of_it(guide_bundle, guided_bundle, picture, capsys):
    argv = [str(guided_bundle), "--guide", str(guide_bundle), "--image", str(picture), "--prompt", "What is it?"]
    argv += ["--max-new-tokens", "3", "--backend", "ort-cpu"]
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == 4 and told["guide"]["exited"] is False and 0 < told["guide"]["confidence"] < 1
    assert told["guide"]["small"] > 0 and told["guide"]["large"] > 0
    assert cli.main([*argv, "--json", "--exit-confidence", "0.000001"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["guide"]["exited"] is True and told["kept"] == told["visual"] and told["guide"]["large"] == 0
    assert cli.main([*argv, "--exit-confidence", "0.000001"]) == 0
    assert "its answer" in capsys.readouterr().err
    assert cli.main([argv[0], "--prompt", "What?", "--exit-confidence", "0.5"]) == 2
    assert "give --guide SMALL" in capsys.readouterr().err


def test_a_conversation_is_guided_where_there_is_a_picture(pair, picture, monkeypatch, capsys):
    said = iter([f"/image {picture}", "What is it?", "Sure?", "/reset", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    asked = []
    with pair() as both:
        for name, chat in (("small", both.small), ("large", both.large)):
            generate = chat.generate
            monkeypatch.setattr(
                chat, "generate", lambda *a, name=name, go=generate, **k: asked.append(name) or go(*a, **k)
            )
        assert chat_cli.converse(both, "", [], {"max_new_tokens": 2}) == 0
        assert both.large.session.lengths.positions[0] == 0  # after /reset
    assert asked == ["small", "large", "large"]


def test_an_exit_confidence_is_of_one_question(guided_bundle, guide_bundle, capsys):
    argv = [str(guided_bundle), "--guide", str(guide_bundle), "--exit-confidence", "0.9"]
    assert cli.main(argv) == 2
    assert "a conversation goes on with one model; give --prompt" in capsys.readouterr().err
