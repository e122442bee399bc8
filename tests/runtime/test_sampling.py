"""sampling.py against transformers' logits warpers, chained as generate() chains them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.sampling import Sampler, Sampling, token_probabilities


def oracle(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


def spread_logits(count: int, seed: int) -> np.ndarray:
    """Logits without ties: at a tie, which of the equal tokens top-k or top-p keeps is nobody's promise."""
    return np.random.default_rng(seed).permutation(np.linspace(-4.0, 5.0, count)) + 0.001 * np.arange(count) ** 0.5


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.3, 5.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([0.013, 0.1, 0.3, 0.517, 0.9, 0.953, 0.999, 1.0]),
)
def test_the_distribution_is_that_of_transformers(count, seed, temperature, top_k, top_p):
    logits = spread_logits(count, seed)
    ours = token_probabilities(logits, Sampling(temperature, top_k, top_p))
    theirs = oracle(logits, temperature, top_k, top_p)
    assert ours.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ((ours > 0) == (theirs > 0)).all()


def test_a_very_small_top_p_keeps_the_most_probable_token():
    probabilities = token_probabilities(np.array([0.0, 2.0, 1.0]), Sampling(1.0, 0, 1e-9))
    assert probabilities.tolist() == [0.0, 1.0, 0.0]


def test_large_logits_do_not_overflow():
    probabilities = token_probabilities(np.array([1e4, -1e4, 1e4 - 1]), Sampling(0.01))
    assert np.isfinite(probabilities).all()
    assert probabilities[0] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_greedy_takes_the_largest_logit_of_every_row(dtype):
    logits = np.array([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]], dtype=dtype)
    tokens = Sampler(Sampling())(logits)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [1, 0]


def test_greedy_takes_the_lowest_id_at_a_tie():
    assert Sampler(Sampling())(np.array([[1.0, 7.0, 7.0, 7.0], [2.0, 2.0, 2.0, 2.0]])).tolist() == [1, 0]


def test_top_k_takes_the_lowest_ids_at_a_tie():
    probabilities = token_probabilities(np.array([1.0, 2.0, 2.0, 2.0]), Sampling(1.0, top_k=2))
    assert probabilities.tolist() == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1, seed=3), Sampling(1.0, top_p=1e-6, seed=3)])
def test_one_candidate_is_the_same_as_greedy(sampling):
    logits = np.stack([spread_logits(40, seed) for seed in range(8)])
    assert Sampler(sampling)(logits).tolist() == logits.argmax(axis=1).tolist()


def draws(seed: int | None, steps: int = 40) -> list[int]:
    sampler = Sampler(Sampling(1.5, seed=seed))
    return [int(sampler(spread_logits(50, step)[None].astype(np.float32))[0]) for step in range(steps)]


def test_equal_seeds_draw_equal_tokens_and_others_do_not():
    assert draws(11) == draws(11)
    assert draws(11) != draws(12)
    assert draws(None) != draws(None)


def test_sampling_leaves_numpys_global_generator_alone():
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    draws(1)
    assert np.random.random() == expected


def test_frequencies_follow_the_distribution():
    logits = np.array([0.2, 1.4, -0.7, 2.0, 0.9, -3.0])
    number = 20000
    tokens = Sampler(Sampling(0.8, top_k=5, top_p=0.97, seed=7))(np.tile(logits, (number, 1)))
    expected = oracle(logits, 0.8, 5, 0.97)
    counts = np.bincount(tokens, minlength=len(logits))
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(number * expected * (1 - expected))
    assert (np.abs(counts - number * expected) <= 5 * deviation).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_its_name_and_value(name, value):
    with pytest.raises(RuntimeRefusal) as caught:
        Sampling(**{name: value})
    assert name.replace("_", "-") in str(caught.value)
    assert str(value) in str(caught.value)
    assert "give" in str(caught.value)
