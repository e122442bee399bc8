"""check-vlm against a backend: the guilty graph is named, and kept tokens may differ by ties only."""

import json
import subprocess
import sys

import numpy as np
import pytest
from onnxruntime import OrtValue

from vlmtrim.export import check_cli
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.measure.check import Recording, compare, tie_gaps
from vlmtrim.runtime.measure.watch import watch
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

STAGES = ("vision", "embed", "decoder")


def failed_stages(report):
    return {row["what"].split(":")[0] for row in report["rows"] if not row["passed"] and ":" in row["what"]}


def check(folder, capsys, *argv):
    status = check_cli.main([str(folder), "--against", "ort-cpu", "--tokens", "3", "--json", *argv])
    return status, json.loads(capsys.readouterr().out)


def test_a_backend_against_itself_is_exact_stage_by_stage(fastv_bundle, capsys):
    status, report = check(fastv_bundle, capsys)
    assert status == 0 and report["passed"]
    for turn in ("picture", "second turn", "text only"):
        rows = {row["what"]: row for row in report["rows"] if row["turn"] == turn}
        assert ("vision: features" in rows) == (turn != "text only")
        assert {"embed: embeddings", "decoder: kept tokens", "decoder: prefill logits", "prefill logits"} <= set(rows)
    assert all(row["difference"] == 0 for row in report["rows"])


@pytest.mark.parametrize("guilty", STAGES)
def test_the_guilty_graph_is_the_only_stage_that_fails(fastv_bundle, capsys, monkeypatch, guilty):
    """One side's graph is off by a hundredth: its own rows fail, and the whole turn; not the other stages."""
    output = {"vision": "image_features", "embed": "inputs_embeds", "decoder": "logits"}[guilty]
    sides = []

    def off(graph, feeds, run):
        outputs = run(feeds)
        if graph == guilty:
            value = sides[0].to_host(outputs[output])
            moved = value + np.float32(1e-2) * np.abs(value).max()
            outputs[output] = OrtValue.ortvalue_from_numpy(moved)
        return outputs

    def one_side_off(name, bundle, **_):
        sides.append(make_backend(name))
        return watch(sides[0], off) if len(sides) == 1 else sides[-1]

    monkeypatch.setattr(check_cli, "choose_backend", one_side_off)
    status, report = check(fastv_bundle, capsys)
    assert status == 1 and failed_stages(report) == {guilty}
    assert any(not row["passed"] for row in report["rows"] if ":" not in row["what"])


def recording(kept, scores, logits=((1.0, 2.0),)):
    """Tokens 0 and 5 are text, 1 to 4 visual."""
    scores = None if scores is None else np.array(scores, np.float32)
    return Recording(np.array(kept), [], np.array(logits, np.float32), np.arange(1, 5), scores)


def test_gaps_are_relative_to_the_threshold():
    ours = recording([0, 2, 3, 5], [0.1, 0.4, 0.2, 0.19])
    gaps = tie_gaps(ours, recording([0, 2, 4, 5], None))  # 3 went, 4 came: both 0.01 from the other side of 0.2
    np.testing.assert_allclose(gaps, [0.05, 0.05], rtol=1e-5)
    far = tie_gaps(ours, recording([0, 1, 3, 5], None))  # 2 went, 0.21 above the best dropped; 1 came, 0.1 below
    np.testing.assert_allclose(sorted(far), [0.5, 1.05], rtol=1e-5)
    assert np.isinf(tie_gaps(ours, recording([1, 2, 3, 5], None))).sum() == 1  # text 0 went


@pytest.mark.parametrize(
    ("dtype", "fourth", "passes"),
    [("float16", 0.199, True), ("float16", 0.19, False), ("float32", 0.199, False), ("float32", 0.2, True)],
)
def test_ties_pass_and_real_differences_fail(dtype, fourth, passes):
    """Two of 100 per cent agree in neither case; what counts is the distance of 5e-3, 5e-2 or 0 to the threshold."""
    expected = recording([0, 2, 3, 5], [0.1, 0.4, 0.2, fourth])
    row, *_ = compare("t", recording([0, 2, 4, 5], None), expected, [], dtype)
    assert row.what == "kept tokens" and row.passed == passes
    assert row.note.startswith(f"3 of 4 equal; {2 if passes else 0} of the 2 others within")
    reversed_row, *_ = compare("t", expected, recording([0, 2, 4, 5], None), [], dtype)
    assert reversed_row.passed == passes


def test_kept_tokens_that_nobody_scored_must_be_equal():
    row, *_ = compare("t", recording([0, 2, 4, 5], None), recording([0, 2, 3, 5], None), [], "float16")
    assert not row.passed


def test_a_watched_backend_is_the_backend_otherwise(fastv_bundle):
    seen, bundle = [], open_bundle(fastv_bundle)

    def hook(graph, feeds, run):
        seen.append(graph)
        return run(feeds)

    plain = Session(bundle, make_backend("ort-cpu")).prefill([[256, 7, 8]])
    session = Session(bundle, watch(make_backend("ort-cpu"), hook))
    np.testing.assert_array_equal(session.prefill([[256, 7, 8]]).logits, plain.logits)
    session.decode(np.array([5]))
    assert seen == ["embed", "decoder", "embed", "decoder"] and session.backend.name == "ort-cpu"


def test_checking_against_a_backend_needs_no_pytorch(fastv_bundle):
    """A device has the runtime only."""
    code = (
        "import sys, importlib.abc\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'):\n"
        "            raise ImportError(name + ' is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from vlmtrim.export import check_cli\n"
        f"sys.exit(check_cli.main([{str(fastv_bundle)!r}, '--against', 'ort-cpu', '--tokens', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("passed\n")
