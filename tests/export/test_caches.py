"""Cache policies against transformers' own attention and each policy's oracle: what stays, caches, logits."""

import dataclasses
import json

import numpy as np
import pytest
from parity import assert_parity

from vlmtrim.export import cli
from vlmtrim.export.families import llava
from vlmtrim.export.oracles.reference import Reference
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.caches import load_policy, policy_names
from vlmtrim.graphs.caches.prefixkv import find_shares
from vlmtrim.runtime import cli as run_cli
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

FIELDS = {"snapkv": {"pool": 3}, "elastic": {"merge": True, "evict": 5}, "csp": {"recent": 0.7}}
FIELDS |= {"scope": {"window": 4, "recent": 2, "every": 3}, "keyformer": {"every": 3, "rise": 0.1}}
TABLE = tuple(tuple(min(1.0, s / 10 * factor) for factor in (0.4, 1.6, 1.2, 0.8)) for s in range(11))


def policy(name, **fields):
    given = {"table": TABLE} if name == "prefixkv" else FIELDS.get(name, {})
    return load_policy(name)(**{**given, **fields})


def cutting(export_tiny, name, method="none", **fields):
    label, share = f"{name}-{method}", 0.97 if name == "zipvl-drop" else 0.3  # of the attention there
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


def two_rows(bundle, lengths=((3, 9), (11, 40))):
    """A prompt a row, words around a picture, and the pictures."""
    contract = bundle.contract
    image = [contract.image_token_id] * contract.image_tokens
    words = np.random.default_rng(0).integers(0, 250, (len(lengths), 80)).tolist()
    rows = [[256, *line[:a], *image, *line[a : a + b]] for line, (a, b) in zip(words, lengths, strict=True)]
    return rows, tuple(generated_picture(seed) for seed in range(len(rows)))


@pytest.mark.parametrize(("name", "method"), [("zipvl-drop", "none"), ("aircache", "fastv"), ("snapkv", "zipvl")])
def test_rows_of_a_batch_are_cut_as_if_alone(name, method, export_tiny):
    """Prompts of different lengths, padded on the right, whose layers hold other numbers of entries."""
    bundle = open_bundle(cutting(export_tiny, name, method))
    selection = None if bundle.contract.selection is None else dict(bundle.contract.selection)
    reference = Reference(llava.MODEL_CLASS, bundle.folder, selection, dataclasses.asdict(bundle.contract.cache))
    session = Session(bundle, make_backend("ort-cpu"), batch=2)
    rows, images = two_rows(bundle)
    prefill = session.prefill(rows, session.processor(images))
    caches = [session.cache_contents(row) for row in range(2)]
    expected = [reference.record(Turn("row", rows[row], images[row : row + 1]), 8) for row in range(2)]
    logits = [prefill.logits]
    for step in range(8):
        logits.append(session.decode(np.array([fed[step] for _, fed in expected])))
    groups = [group.layers for group in bundle.contract.groups]
    for row, (want, _) in enumerate(expected):
        held = [of_layer[row] for of_layer in prefill.held]
        kept = None if prefill.kept_indices is None else prefill.kept_indices[row]
        found = Recording(kept, caches[row], np.stack([step[row] for step in logits]), held=held)
        assert all(np.array_equal(a, b) for a, b in zip(held, want.held, strict=True))
        assert Parity(tuple(compare("row", found, want, groups, "float32")))
    counts = np.array([[one.shape[1] for one in layer] for layer in prefill.held])
    assert name == "snapkv" or len({*counts[:, 0], *counts[:, 1]}) > 2


def test_a_bundle_serves_every_share_and_what_stays_makes_room(export_tiny):
    """All of it is the bundle without a policy, to the bit; less of it leaves the room of what goes."""
    bundle, plain = open_bundle(cutting(export_tiny, "snapkv")), open_bundle(export_tiny("dense", method="none"))
    logits, rooms = {}, {}
    for name, share, opened in [("plain", None, plain), *((s, s, bundle) for s in (1.0, 0.5, 0.1))]:
        session = Session(opened, make_backend("ort-cpu"))
        if share is not None:
            session.caching.share = share
        rows, images = two_rows(opened, [(3, 9)])
        first = session.prefill(rows, session.processor(images)).logits
        logits[name], rooms[name] = [first, session.decode(np.array([40]))], session.room()
    np.testing.assert_array_equal(logits["plain"], logits[1.0])
    np.testing.assert_array_equal(logits["plain"][0], logits[0.1][0])  # the cut comes behind the first token
    assert np.abs(logits["plain"][1] - logits[0.1][1]).max() > 1e-3
    n = bundle.contract.image_tokens
    assert [rooms[s] - rooms["plain"] for s in (1.0, 0.5, 0.1)] == [0, n - round(n / 2), n - round(n * 0.1)]


def test_questions_without_pictures_and_pictures_behind_pictures_leave_what_was_there(export_tiny):
    session = Session(open_bundle(cutting(export_tiny, "aircache")), make_backend("ort-cpu"))
    rows, images = two_rows(session.bundle, [(3, 9)])
    session.prefill(rows, session.processor(images))
    first = session.cache_contents(0)
    text = session.prefill([[40, 41, 42]])
    assert text.held is None
    session.prefill(rows, session.processor(images))
    for (key, value), (later_key, later_value) in zip(first, session.cache_contents(0), strict=True):
        np.testing.assert_array_equal(key, later_key[:, : key.shape[1]])
        np.testing.assert_array_equal(value, later_value[:, : value.shape[1]])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--cache-share", "0.5"], "--cache-share is of a cache policy; give --cache POLICY"),
        (["--cache", "snapkv", "--cache-share", "1.5"], "give the share of visual tokens that stays, 0 to 1"),
        (["--cache", "snapkv", "--cache-alpha", "1"], "--cache-alpha belongs to --cache aircache"),
        (["--cache", "snapkv", "--cache-window", "0"], "window is 0: give the number of rows, 1 or more"),
        (["--cache", "snapkv", "--cache-pool", "2"], "give an odd number of neighbours"),
        (["--cache", "aircache", "--cache-alpha", "0"], "alpha is 0.0: give a share above 0, up to 1"),
        (["--cache", "csp", "--cache-cross", "2"], "give shares"),
        (["--cache", "snapkv", "--method", "pyramid"], "method pyramid says it of its last stage alone"),
        (["--cache", "snapkv", "--method", "tidal"], "method tidal reads in all layers the entries that one of them"),
        (["--cache", "snapkv", "--method", "none", "--emit-guide"], "leave one of them out"),
    ],
)
def test_what_does_not_go_together_is_refused(argv, says, capsys):
    assert cli.main(["--model", "demo", *argv, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_features_of_cross_attention_are_not_for_a_policy(capsys):
    assert cli.main(["--model", "tiny:mllama", "--method", "none", "--cache", "csp", "--dry-run"]) == 2
    assert "--method trimmed-llama cuts before they are cached" in capsys.readouterr().err


def test_a_share_without_policy_and_a_policy_that_lies_are_refused(export_tiny, monkeypatch):
    with pytest.raises(RuntimeRefusal, match="no cache policy"):
        Session(open_bundle(export_tiny("dense", method="none")), make_backend("ort-cpu")).caching.share = 0.5
    session = Session(open_bundle(cutting(export_tiny, "snapkv")), make_backend("ort-cpu"))
    rows, images = two_rows(session.bundle, [(3, 9)])
    with pytest.raises(RuntimeRefusal, match="give 0 to 1"):
        session.caching.share = -0.1
    run, host = session._graph("policy").run, session.backend.to_host
    monkeypatch.setattr(session.backend, "to_host", lambda v: v if isinstance(v, np.ndarray) else host(v))
    for wrong in (lambda counts, order: (counts + 1000, order), lambda counts, order: (counts, order - 5)):

        def lying(feeds, wrong=wrong):
            chosen = {name: host(value) for name, value in run(feeds).items()}
            return dict(zip(("counts", "order"), wrong(chosen["counts"], chosen["order"]), strict=True))

        monkeypatch.setattr(session._graphs["policy"], "run", lying)
        session.reset()
        with pytest.raises(RuntimeRefusal, match="export the model again"):
            session.prefill(rows, session.processor(images))


def test_run_vlm_says_what_the_caches_hold(export_tiny, picture, tmp_path, capsys):
    folder, drawing = cutting(export_tiny, "aircache"), tmp_path / "kept.png"
    argv = [str(folder), "--image", str(picture), "--prompt", "What is it?", "--max-new-tokens", "3", "--json"]
    assert run_cli.main([*argv, "--cache-share", "0.25", "--show-kept", str(drawing)]) == 0
    caches = json.loads(capsys.readouterr().out)["caches"]
    assert caches["policy"] == {"policy": "aircache", "alpha": 0.9, "window": 64} and caches["share"] == 0.25
    held, entries = caches["visual_by_layer"], caches["entries_by_layer"]
    assert np.mean(held) / 16 == pytest.approx(0.25, abs=0.07) and len(set(held)) > 1
    assert len({total - visual for total, visual in zip(entries, held, strict=True)}) == 1  # text, the same everywhere
    contract = open_bundle(folder).contract
    each = 2 * contract.groups[0].kv_heads * contract.groups[0].head_size * 4
    assert caches["bytes"] == sum(entries) * each < caches["allocated"]
    assert drawing.stat().st_size > 1000
    assert run_cli.main([*argv, "--cache-every", "4"]) == 2
    assert "not cut while an answer grows" in capsys.readouterr().err


def test_a_growing_answer_is_cut_at_every_interval(export_tiny):
    """SCOPE: prompt and pictures stay, of the answer no more than its window and what was said since the last round."""
    session = Session(open_bundle(cutting(export_tiny, "scope")), make_backend("ort-cpu"))
    rows, images = two_rows(session.bundle, [(3, 9)])
    session.prefill(rows, session.processor(images))
    start, lengths = int(session.lengths.entries[0][0]), []
    for token in range(40, 52):
        session.decode(np.array([token]))
        lengths.append(int(session.lengths.entries[0][0]) - start)
    assert start == len(rows[0]) and lengths == [1, 2, 3, 4, 5, 4, 5, 6, 4, 5, 6, 4]
    session.caching.every = 6
    assert session.caching.every == 6


def test_prefixkv_finds_the_shares_that_one_threshold_gives(tmp_path, export_tiny):
    """Together the tenth that was asked for, more where the scores are flatter; --cache-table reads what was found."""
    random = np.random.default_rng(0)
    samples = [random.random((3, 400)) ** np.array([[1.0], [4.0], [12.0]]) for _ in range(4)]
    table = np.array(find_shares(samples))
    np.testing.assert_allclose(table.mean(axis=1), np.linspace(0, 1, 11), atol=0.01)
    assert (np.diff(table, axis=0) >= 0).all() and (table[1:10, 0] > table[1:10, 1]).all()
    ranked = np.sort(samples[0], axis=1)[:, ::-1]
    held = ranked.cumsum(axis=1) / ranked.sum(axis=1, keepdims=True)
    kept = (np.array(find_shares(samples[:1]))[5] * 400).round().astype(int)
    reached = [held[layer, n - 1] for layer, n in enumerate(kept)]  # what the kept ones hold is one threshold
    assert np.ptp(reached) < 0.01
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(2):
        generated_picture(seed).save(pictures / f"{seed}.png")
    argv = ["--model", "tiny:llava", "--method", "none", "--cache", "prefixkv"]
    assert cli.main([*argv, "--calibrate", str(pictures), "--output", str(tmp_path / "one")]) == 0
    again = ["--cache-table", str(tmp_path / "one" / "cache_shares.json")]
    assert cli.main([*argv, *again, "--output", str(tmp_path / "two")]) == 0
    one, two = (open_bundle(tmp_path / name) for name in ("one", "two"))
    assert one.sums["policy.onnx"] == two.sums["policy.onnx"] and len(one.contract.cache.policy["table"]) == 11


def test_a_table_of_another_model_is_a_sentence(tmp_path, capsys):
    (tmp_path / "table.json").write_text(json.dumps({"shares": [[0.1 * row] * 3 for row in range(11)]}))
    argv = ["--model", "tiny:llava", "--method", "none", "--cache", "prefixkv", "--output", str(tmp_path / "bundle")]
    assert cli.main([*argv, "--cache-table", str(tmp_path / "table.json")]) == 1
    assert "the table is of 3 layers, the decoder has 4: calibrate it" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
