"""A bounded part of the fuzzing, the same every time; ``scripts/fuzz.py`` goes on from there."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import foreign
import pytest
import targets


def fuzzed(target, *work, module=targets):
    """A target's report, from a process of its own: attempts are forked, and what a process holds in which other tests
    have run, memory and locks of threads, they would hold as well."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(getattr(module, target), *work).result()


@pytest.fixture(scope="module")
def folders(fastv_bundle, dense_bundle, export_tiny):
    """Bundles of several families and methods."""
    return [
        fastv_bundle,
        dense_bundle,
        export_tiny("fuzz-qwen", family="qwen2_5_vl", k=1, r=0.5),
        export_tiny("fuzz-mllama", family="mllama", method="trimmed-llama", ratio=0.25),
    ]


def test_mutants_of_bundles_run_or_are_refused(folders):
    report = fuzzed("bundles", folders, 120, 1)
    assert report.clean, report.failures[:3]
    assert report.tally["refused"] > 40 and report.tally["ran"] > 5


def test_damaged_and_odd_pictures_are_seen_or_refused(folders):
    report = fuzzed("pictures", folders, 150, 1)
    assert report.clean, report.failures[:3]
    assert report.tally["refused"] > 10 and report.tally["ran"] > 10


def test_whatever_is_typed_stays_text(folders):
    report = fuzzed("prompts", folders, 150, 1)
    assert report.clean, report.failures[:3]
    assert report.tally["ran"] > 100


def test_templates_run_or_are_refused():
    report = fuzzed("templates", 150, 1)
    assert report.clean, report.failures[:3]
    assert report.tally["refused"] > 10 and report.tally["ran"] > 10


def test_mutants_of_decoders_are_trimmed_or_refused():
    """500 of them take ``scripts/fuzz.py decoders --count 500``."""
    report = fuzzed("decoders", 50, 1, module=foreign)
    assert report.clean, report.failures[:3]
    assert report.tally["refused"] > 5 and report.tally["ran"] > 10


def test_mutants_of_vision_and_embedding_are_rewritten_or_refused():
    """500 of them take ``scripts/fuzz.py parts --count 500``."""
    report = fuzzed("parts", 60, 1, module=foreign)
    assert report.clean, report.failures[:3]
    assert report.tally["refused"] > 5 and report.tally["ran"] > 10
