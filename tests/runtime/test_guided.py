"""A bundle guided by another: scores at the boundary of a session."""

import numpy as np
import pytest

from vlmtrim import runtime
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import load_image


@pytest.fixture(scope="module")
def guided_bundle(export_tiny):
    return export_tiny("parity", method="guided", max_batch=2)


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
