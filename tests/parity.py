"""What is held for every family with every method that it names, and what check-vlm must say of a bundle."""

import json

import pytest

from vlmtrim.export import check_cli
from vlmtrim.export.arguments import methods_of
from vlmtrim.export.checkpoint import family_names, prunes
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import IMAGES

# Of these every method runs by default. Methods know no family: of the others fastv runs, the rest is slow.
THOROUGH = ("llava", "mllama", "qwen2_5_vl")
# Engines take longest. Of these every method's are built by default: positions of three numbers are fastv's as well.
BUILT = ("llava", "mllama")
ENGINES = "TensorRT-RTX engines"
# Of methods that do nothing by default in what tests are made of: 9 of some 60 cache entries.
FIELDS = {"tidal": {"entries": 9, "selecting": (0, 2)}}


def is_slow(family, method, backend):
    """Whether only a run of slow tests proves this combination."""
    return family not in (BUILT if backend == ENGINES else THOROUGH) and method != "fastv"


def combinations(backend):
    """Parameters of a test: every family with every method that it names, and with none."""
    return [
        pytest.param(family, method, marks=[pytest.mark.slow] * is_slow(family, method, backend))
        for family in family_names()
        for method in (*methods_of(family), "none")
    ]


def room_of(family):
    """Fields of a job in which three turns of two rows with a picture each fit; one set of them, one trace a family."""
    return {"images": 3, "max_batch": 2} | (
        {} if IMAGES in prunes(family) else {"max_seq_len": 1024, "image_tokens": 0}
    )


def assert_parity(folder, capsys, *arguments):
    """check-vlm passes: three turns, kept sets where something is selected, caches, logits and greedy tokens."""
    steps = arguments[1] if arguments else "32"
    assert check_cli.main([str(folder), "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    seen = {(row["turn"], row["what"]) for row in report["rows"]}
    for turn in ("picture", "second turn", "text only"):
        assert (turn, "prefill logits") in seen and (turn, f"decode logits, {steps} steps") in seen
    if open_bundle(folder).contract.removes:
        assert {(turn, "kept tokens") for turn in ("picture", "second turn", "text only")} <= seen
