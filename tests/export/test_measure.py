"""Intervals and counts of the accuracy report, against figures from elsewhere."""

import numpy as np
import pytest

from vlmtrim.export.demo.measure import change, wilson
from vlmtrim.export.flops import decoder_macs, prefill_macs


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_intervals_are_newcombes(right, asked, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_change_is_paired():
    before = np.array([True] * 90 + [False] * 10)
    after = before.copy()
    assert change(before, after) == (0.0, 0.0)
    after[:5], after[95:] = False, True  # five lost, five won
    mean, half = change(before, after)
    assert mean == 0 and half == pytest.approx(1.96 * (0.1 / 100) ** 0.5, rel=1e-3)


class Llama13B:
    hidden_size, intermediate_size, num_attention_heads, num_key_value_heads = 5120, 13824, 40, 40
    num_hidden_layers, vocab_size = 40, 32000


def test_layer_macs_are_the_papers_with_three_mlp_matrices():
    """FastV, section 4.2: 4 n d^2 + 2 n^2 d + 2 n d f; ours counts the gate's matrix as well."""
    n, d, f = 612, 5120, 13824
    macs = decoder_macs(Llama13B)
    assert macs.prefill([(1, n)]) - macs.logits == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * f


@pytest.mark.parametrize(("r", "share"), [(0.5, 0.55), (0.75, 0.32), (0.9, 0.19)])
def test_share_at_k_2_is_the_papers(r, share):
    """FastV, table 1, LLaVA-1.5-13B, K = 2: 55, 32 and 19 % of the FLOPs (rounded, two MLP matrices, no logits)."""
    kept = prefill_macs(Llama13B, 612, 576, 2, r) / prefill_macs(Llama13B, 612, 576, 2, 0)
    assert kept == pytest.approx(share, abs=0.012)
