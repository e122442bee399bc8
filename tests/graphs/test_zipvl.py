"""ZipVL's choice alone, attention given: ONNX Runtime against plain Python; the golden text; refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_text import assert_golden
from toy_decoder import build, weights

from vlmtrim.graphs import GraphError
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.methods.zipvl import ZipVL, read_budgets

GOLDEN = Path(__file__).parent / "golden" / "zipvl.txt"


def test_the_graph_of_a_layer_is_the_golden_text():
    assert_golden(ZipVL()(build(weights(0, 2, 4, 2), 16), 8).graph, GOLDEN, "keep/")


def test_every_layer_has_a_cache_group_as_small_as_its_bound():
    dense = (CacheGroup((0, 1, 2), 100, 2, 8),)
    groups = ZipVL(bound=(0.5, 1.0, 0.25)).groups(dense, 40)
    assert [group.layers for group in groups] == [(0,), (1,), (2,)]
    assert [group.capacity for group in groups] == [80, 100, 70]
    assert [group.length(30, 20) for group in groups] == [20, 30, 15]
    assert all(group.chooses for group in groups)


def test_bounds_and_budgets_come_from_a_file(tmp_path):
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"layers": [{"mean": 0.5, "deviation": 0.1}, {"mean": 0.95, "deviation": 0.1}]}))
    assert read_budgets(file) == ((0.5, 0.95), (0.1, 0.1))
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no file of budgets"):
        read_budgets(file)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tau": 0}, "tau is 0"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"bound": 0}, "bound holds 0"),
        ({"bound": (0.5, 2.0)}, "bound holds 2.0"),
        ({"budgets": (0.0,)}, "budgets holds 0.0"),
        ({"recent": 0}, "recent is 0"),
        ({"spread": -1}, "spread -1"),
        ({"tau": np.nan}, "tau is nan"),
    ],
)
def test_parameters_out_of_range_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        ZipVL(**fields)


def test_shares_of_another_model_are_refused():
    with pytest.raises(ValueError, match="2 layers were calibrated, the decoder has 3"):
        ZipVL(bound=(0.5, 0.5)).groups((CacheGroup((0, 1, 2), 100, 2, 8),), 40)


def test_a_decoder_that_selects_already_is_refused():
    model = ZipVL()(build(weights(0, 2, 4, 2), 16), 8)
    with pytest.raises(GraphError):
        ZipVL()(model, 8)
