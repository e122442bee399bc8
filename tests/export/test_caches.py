"""Cache policies against transformers' own attention and each policy's oracle: what stays, caches, logits."""


import pytest
from parity import assert_parity

from vlmtrim.graphs.caches import load_policy, policy_names

FIELDS = {"snapkv": {"pool": 3}, "elastic": {"merge": True}, "csp": {"recent": 0.7}}
TABLE = tuple(tuple(min(1.0, s / 10 * factor) for factor in (0.4, 1.6, 1.2, 0.8)) for s in range(11))


def policy(name, **fields):
    given = {"table": TABLE} if name == "prefixkv" else FIELDS.get(name, {})
    return load_policy(name)(**{**given, **fields})


def cutting(export_tiny, name, method="none", share=0.3, **fields):
    label = f"{name}-{method}"
    return export_tiny(label, method=method, cache=policy(name), cache_share=share, max_batch=2, **fields)


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_leaves_what_its_oracle_leaves(name, export_tiny, capsys):
    """Three turns of the dense model; caches, logits and tokens behind the cut."""
    assert_parity(cutting(export_tiny, name), capsys, "--tokens", "8")


@pytest.mark.parametrize("name", ["aircache", "snapkv"])
@pytest.mark.parametrize("method", ["fastv", "zipvl", "guided"])
def test_behind_a_selection_what_is_left_of_the_picture_is_judged(name, method, export_tiny, capsys):
    assert_parity(cutting(export_tiny, name, method), capsys)


@pytest.mark.parametrize("name", ["csp", "vl-cache"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_pictures_of_any_size_and_positions_of_three_numbers(name, family, export_tiny, capsys):
    assert_parity(cutting(export_tiny, name, "fastv", family=family), capsys, "--tokens", "8")
