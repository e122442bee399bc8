"""TidalDecode against PyTorch: head layouts, depths, rows of a batch, what a tie excuses and what not; engines."""

import json

import numpy as np
import pytest
from parity import assert_parity

from vlmtrim.export import check_cli, cli
from vlmtrim.export.families import llava
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, compare_turns
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

VARIANTS = {
    "default layers": ({}, {"entries": 12}),
    "mha": ({"kv_heads": 4}, {"entries": 7, "selecting": (0, 2)}),
    "one key head": ({"kv_heads": 1}, {"entries": 7, "selecting": (1,)}),
    "qwen2, six layers": ({"text": "qwen2", "layers": 6}, {"entries": 16}),
    "mistral, windows grow beyond": ({"text": "mistral"}, {"entries": 50, "selecting": (0, 1)}),
}


@pytest.fixture(scope="module")
def bundle(export_tiny):
    return export_tiny("tidal", method="tidal", max_batch=2, entries=9, selecting=(0, 2))


slow = {"mha", "one key head", "mistral, windows grow beyond"}  # what tests/graphs/test_tidal.py holds in numpy, too


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in slow)) for v in VARIANTS])
def test_every_layout_equals_pytorch(variant, export_tiny, capsys):
    shape, fields = VARIANTS[variant]
    assert_parity(export_tiny("tidal", shape, method="tidal", **fields), capsys)


def test_no_step_is_excused_by_a_tie_in_float32(bundle, capsys):
    assert check_cli.main([str(bundle), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    steps = [row for row in rows if row["what"].startswith("decode logits")]
    assert len(steps) == 3 and all(row["note"] == "" and row["difference"] > 0 for row in steps)
    assert not any("tie" in row["note"] for row in rows)


def test_rows_of_a_batch_equal_single_runs(bundle):
    """Prompts of different lengths, padded on the right; in the shorter all is attended to for some steps."""
    opened = open_bundle(bundle)
    reference = Reference(llava.MODEL_CLASS, opened.folder, {**opened.contract.selection})
    session = Session(opened, make_backend("ort-cpu"), batch=2)
    random, image = np.random.default_rng(0), [opened.contract.image_token_id] * opened.contract.image_tokens
    text = random.integers(0, 250, 60).tolist()
    rows = [[256, *text[:3], *image, *text[3:9]], [256, *text[9:20], *image, *text[20:60]]]
    short = [[256, *text[:5]], [256, *text[9:20]]]
    images = (generated_picture(0), generated_picture(1))
    for prompts, pictures in ((rows, images), (short, ())):
        session.reset()
        prefill = session.prefill(prompts, session.processor(pictures) if pictures else None)
        caches = [session.cache_contents(row) for row in range(2)]
        expected = [reference.record(Turn("row", prompts[r], pictures[r : r + 1]), 8) for r in range(2)]
        logits = [prefill.logits] + [session.decode(np.array([fed[i] for _, fed in expected])) for i in range(8)]
        for row, (want, _) in enumerate(expected):
            found = Recording(None, caches[row], np.stack([step[row] for step in logits]))
            parity = Parity(tuple(compare("row", found, want, [(0, 1, 2, 3)], "float32")))
            assert parity and "tie" not in parity.table()


def test_a_bundle_that_attends_to_others_fails_the_check(bundle, capsys, monkeypatch):
    """Judged by one entry more, or by another layer, the same bundle fails from the first step on."""
    real = check_cli.open_bundle
    for change in ({"entries": 10}, {"selecting": (1,)}):

        def other_selection(folder, change=change):
            opened = real(folder)
            object.__setattr__(opened.contract, "selection", {**opened.contract.selection, **change})
            return opened

        monkeypatch.setattr(check_cli, "open_bundle", other_selection)
        assert check_cli.main([str(bundle), "--tokens", "2"]) == 1
        assert "FAILED" in capsys.readouterr().out


def test_a_tie_excuses_what_follows_it_and_nothing_before():
    def recorded(logits, nearest=None):
        return Recording(None, [(np.zeros((1, 1, 1)),) * 2], np.array(logits), nearest=nearest)

    right, late = [[0.0, 1.0]] * 4, [[0.0, 1.0]] * 3 + [[5.0, 1.0]]
    tie, clear = np.array([np.inf, 0.1, 1e-5, 0.1]), np.array([np.inf, 0.1, 0.2, 0.1])
    excused = compare("t", recorded(late), recorded(right, tie), [(0,)], "float32")
    assert Parity(tuple(excused)) and any("2 of 3; then a tie" in row.note for row in excused)
    assert not Parity(tuple(compare("t", recorded(late), recorded(right, clear), [(0,)], "float32")))
    early = [[0.0, 1.0], [5.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    assert not Parity(tuple(compare("t", recorded(early), recorded(right, tie), [(0,)], "float32")))
    turns = [Turn("one", []), Turn("two", [], opens=False)]
    pairs = [(recorded(right), recorded(right, tie)), (recorded(early), recorded(right, clear))]
    assert all(Parity(tuple(rows)) for rows in compare_turns(turns, pairs, [(0,)], "float32"))
    pairs[0] = recorded(right), recorded(right, clear)
    assert not Parity(tuple(compare_turns(turns, pairs, [(0,)], "float32")[1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16: tests/export/test_families.py
def test_engines_build_with_both_profiles(dtype, export_tiny):
    folder = export_tiny(
        "tidal", method="tidal", entries=9, selecting=(0, 2), dtype=dtype, engine="tensorrt-rtx", max_batch=2
    )
    assert (folder / "decoder.engine").stat().st_size > 100_000


def test_a_chain_of_engines_builds_and_equals_pytorch(export_tiny, capsys):
    folder = export_tiny(
        "tidal", method="tidal", entries=9, selecting=(1,), dtype="float16", engine="tensorrt-rtx", engine_shards=2
    )
    assert (folder / "decoder-1.engine").stat().st_size > 100_000
    crossing = [tensor.name for tensor in open_bundle(folder).contract.graphs["decoder-1"].inputs]
    assert "attended_first.1" in crossing
    assert_parity(folder, capsys, "--tokens", "4")


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, capsys):
    for arguments, why in (
        (["--entries", "0"], "entries is 0"),
        (["--selecting", "3"], "give --selecting 0 to 2"),
        (["--selecting", "2;3"], "is no list of layers"),
        (["--max-seq-len", "512"], "caches hold at most 512 entries, a layer is to attend to 1024"),
    ):
        output = tmp_path / "bundle"
        try:
            code = cli.main(["--model", "tiny:llava", "--method", "tidal", "--output", str(output), *arguments])
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and not output.exists()
        assert why in capsys.readouterr().err
    assert cli.main(["--model", "tiny:mllama", "--method", "tidal", "--output", str(tmp_path / "b")]) == 2
    assert "method tidal is for visual tokens of the sequence" in capsys.readouterr().err
