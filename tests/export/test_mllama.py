"""Llama-3.2-Vision bundles, dense and trimmed, against the unpatched model and the independent oracle."""

import measure_union
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from vlmtrim.export import check_cli, cli, pipeline
from vlmtrim.export.families import mllama
from vlmtrim.export.job import Job
from vlmtrim.export.oracles.reference_mllama import Reference
from vlmtrim.export.oracles.trimmed_llama import Oracle
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.methods.trimmed_llama import TrimmedLlama
from vlmtrim.runtime import Chat
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, compare_turns, record
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

IMAGE = 259
TEXT = np.random.default_rng(3).integers(0, 250, 60).tolist()
# name -> fields of the job; a bound equal to the ratio cuts every union.
METHODS = {
    "dense": {"method": "none"},
    "quarter": {"method": "trimmed-llama", "ratio": 0.25},
    "tenth-cut": {"method": "trimmed-llama", "ratio": 0.1, "bound": 0.1},
}


@pytest.fixture(scope="module", params=METHODS)
def bundle(request, export_tiny):
    return open_bundle(export_tiny(request.param, family="mllama", images=3, max_batch=2, **METHODS[request.param]))


def reference(bundle):
    selection = bundle.contract.selection
    return Reference(mllama.MODEL_CLASS, bundle.folder, None if selection is None else dict(selection))


def picture(seed, size=(240, 200)):
    """240 x 200 fills four tiles, 40 x 30 one, 100 x 50 two."""
    return check_cli.generated_picture(seed).resize(size)


def agree(name, bundle, found, expected):
    groups = [group.layers for group in bundle.contract.groups]
    parity = Parity(tuple(compare(name, found, expected, groups, "float32")))
    assert parity, "\n" + parity.table()


def test_rows_of_a_batch_equal_single_runs(bundle):
    """Other lengths, marks and numbers of filled tiles in each row; rows keep different numbers of features."""
    session, oracle = Session(bundle, make_backend("ort-cpu"), batch=2), reference(bundle)
    images = picture(0, (40, 30)), picture(1)
    rows = [[256, *TEXT[:3], IMAGE, *TEXT[3:9]], [256, IMAGE, *TEXT[9:40]]]
    prefill = session.prefill(rows, session.processor(images))
    caches = [session.cache_contents(row) for row in range(2)]
    logits = [prefill.logits]
    expected = [oracle.record(Turn("row", rows[row], images[row : row + 1]), 6) for row in range(2)]
    for step in range(6):
        logits.append(session.decode(np.array([fed[step] for _, fed in expected])))
    for row, (want, _) in enumerate(expected):
        kept = None if want.kept is None else prefill.kept_features[row]
        agree(f"row {row}", bundle, Recording(kept, caches[row], np.stack([s[row] for s in logits])), want)
    if bundle.contract.selection is not None:
        few, many = map(len, prefill.kept_features)
        most = bundle.contract.groups[1].length(0, 68)
        assert 0 < few <= 17 and many == prefill.kept <= most < 68
        assert few < many or many == most
        assert max(prefill.kept_features[0]) < 17, "features of empty tiles were kept"


def test_several_pictures_in_a_prompt(bundle):
    """Two marks side by side, whose text sees both pictures, then one more; text before them sees none."""
    session, oracle = Session(bundle, make_backend("ort-cpu")), reference(bundle)
    ids = [256, *TEXT[:4], IMAGE, IMAGE, *TEXT[4:9], IMAGE, *TEXT[9:15]]
    turn = Turn("three", ids, (picture(0, (100, 50)), picture(1), picture(2, (40, 30))))
    expected, tokens = oracle.record(turn, 4)
    agree("three", bundle, record(session, turn, tokens)[0], expected)


def test_a_picture_after_turns_of_text(bundle):
    """Empty cross caches first, then a picture, then text that still sees it, then another picture."""
    session, oracle = Session(bundle, make_backend("ort-cpu")), reference(bundle)
    turns = [
        Turn("text", [256, *TEXT[:6]]),
        Turn("picture", [*TEXT[6:9], IMAGE, *TEXT[9:14]], (picture(0, (100, 50)),), opens=False),
        Turn("more text", TEXT[14:20], opens=False),
        Turn("another", [*TEXT[20:22], IMAGE, *TEXT[22:30]], (picture(1),), opens=False),
    ]
    for turn in turns:
        expected, tokens = oracle.record(turn, 3)
        agree(turn.name, bundle, record(session, turn, tokens)[0], expected)


def test_appending_a_picture_equals_processing_everything_at_once(export_tiny):
    """Where no text comes before the first picture; transformers lets such text attend to later pictures as well."""
    bundle = open_bundle(export_tiny("dense", family="mllama", images=3, max_batch=2, method="none"))
    session, oracle = Session(bundle, make_backend("ort-cpu")), reference(bundle)
    parts = [[IMAGE, *TEXT[:7]], [*TEXT[7:10], IMAGE, *TEXT[10:20]]]
    images = picture(0, (100, 50)), picture(1)
    for ids, image in zip(parts, images, strict=True):
        found = session.prefill([ids], session.processor([image]))
    whole, _ = oracle.record(Turn("whole", [*parts[0], *parts[1]], images), 0)
    np.testing.assert_allclose(found.logits[0], whole.logits[0], atol=1e-5)


def test_the_oracle_that_keeps_everything_is_the_plain_forward(export_tiny):
    """The oracle's own loop at ratio 1 with four filled tiles."""
    folder = export_tiny("dense", family="mllama", images=3, max_batch=2, method="none")
    turn = Turn("t", [256, *TEXT[:3], IMAGE, *TEXT[3:9]], (picture(0),))
    plain, tokens = Reference(mllama.MODEL_CLASS, folder, None).record(turn, 4)
    looped, same = Reference(
        mllama.MODEL_CLASS, folder, {"method": "trimmed-llama", "ratio": 1.0, "bound": 1.0}
    ).record(turn, 4)
    assert tokens == same and len(looped.kept) == 68
    np.testing.assert_allclose(looped.logits, plain.logits, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_margins_say_how_much_changes_a_choice(seed):
    """Scores that move by less than half a feature's margin leave it on its side; beyond its margin it can be moved."""
    oracle = Oracle({"ratio": 0.2, "bound": 1.0})
    random = np.random.default_rng(seed)
    scores, alive = torch.from_numpy(random.random((3, 25)) + 0.1), torch.from_numpy(random.random(25) < 0.8)
    kept, margins = oracle.choose(scores, alive)
    count = max(1, round(0.2 * int(alive.sum())))
    worst = torch.where(alive, scores, -1.0).sort(1, descending=True).values[:, count - 1 : count]
    assert torch.isinf(margins[~alive]).all() and (margins[alive] > 0).all()
    for feature in torch.nonzero(alive).flatten().tolist():
        noise = torch.from_numpy(random.uniform(-0.49, 0.49, scores.shape)) * worst * margins[feature]
        assert (feature in oracle.choose(scores + noise, alive)[0]) == (feature in kept)
        moved = scores.clone()
        push = 1.001 * worst[:, 0] * margins[feature]
        moved[:, feature] += -push if feature in kept else push
        assert (feature in oracle.choose(moved, alive)[0]) != (feature in kept)


def test_a_tie_of_heads_passes_and_what_is_no_tie_fails():
    logits, margins = np.zeros((2, 4), np.float32), np.array([0.5, 0.001, 0.3, np.inf])
    expected = Recording(np.array([0, 1]), [], logits, margins=margins)
    for kept, passes in (([0], True), ([1], False), ([0, 1, 2], False), ([0, 1, 3], False)):
        found = Recording(np.array(kept), [], logits + 9)
        rows = compare("t", found, expected, [], "float16")
        assert bool(Parity(tuple(rows))) == passes and ("not comparable" in rows[-1].note) == passes
    other, same = Recording(np.array([0]), [], logits), Recording(np.array([0, 1]), [], logits + 9)
    turns = [Turn("tied", [1]), Turn("after it", [1], opens=False), Turn("anew", [1])]
    rows = compare_turns(turns, [(other, expected), (same, expected), (same, expected)], [], "float16")
    assert [bool(Parity(tuple(turn))) for turn in rows] == [True, True, False]
    assert not Parity(tuple(compare("u", same, expected, [], "float16")))


def test_pictures_reach_the_answer(bundle):
    """Open gates: another picture, other logits; a chat of two turns and the refusal of one picture too many."""
    session = Session(bundle, make_backend("ort-cpu"))
    ids = [256, IMAGE, *TEXT[:8]]
    logits = []
    for seed in (0, 1):
        session.reset()
        logits.append(session.prefill([ids], session.processor([picture(seed)])).logits)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    chat = Chat(session)
    steps = list(chat.generate("What is this?", [picture(0)], max_new_tokens=3))
    assert steps[0].prefill.visual == 68 and steps[0].prefill.kept == len(steps[0].prefill.kept_features[0])
    list(chat.generate("And this?", [picture(1)], max_new_tokens=2))
    with pytest.raises(RuntimeRefusal, match="--images"):
        chat.generate("And these?", [picture(2), picture(3), picture(4)])


def test_the_unions_of_heads_that_choose_everything_are_the_filled_tiles(export_tiny):
    """scripts/measure_union.py, against the tiles that transformers counts."""
    folder = export_tiny("everything", family="mllama", method="trimmed-llama", ratio=1.0, bound=1.0, images=3)
    features, sizes = measure_union.unions(folder, 8)
    images = [picture(seed, size) for seed, size in enumerate(measure_union.SHAPES)]
    tiles = [AutoProcessor.from_pretrained(folder).image_processor([[image]])["num_tiles"][0][0] for image in images]
    assert features == 68 and sizes.tolist() == [17 * count for count in tiles]


def test_profiles_of_features(export_tiny):
    """A prefill brings all the pictures' features at most, and the caches of cross-attention may be empty."""
    contract = open_bundle(
        export_tiny("quarter", family="mllama", images=3, max_batch=2, **METHODS["quarter"])
    ).contract
    both = profiles.decoder_profiles(contract)
    ranges = [(r.min, r.opt, r.max) for r in (both["prefill"]["N"], both["decode"]["N"])]
    assert ranges == [(0, 204, 204), (0, 0, 0)]
    assert both["prefill"]["W1"].min == both["decode"]["W1"].min == 1
    assert both["decode"]["W1"].max == contract.groups[1].capacity == 178


@pytest.mark.parametrize(("model", "method"), [("tiny:mllama", "fastv"), ("demo", "trimmed-llama")])
def test_an_unproven_combination_is_refused(model, method, tmp_path, capsys):
    assert cli.main(["--model", model, "--method", method, "--output", str(tmp_path / "b")]) == 2
    assert f"method {method} removes" in (said := capsys.readouterr().err) and "or none" in said


@pytest.mark.parametrize(("method", "shards"), [("none", 5), ("trimmed-llama", 5), ("trimmed-llama", 2)])
def test_a_chain_runs_like_the_whole(method, shards, export_tiny):
    """Float32 engines of every layer, or of three and two: kept features are gathered again in every piece, as many as
    the heads named instead of the bound."""
    cut = open_bundle(
        export_tiny(
            f"cut{shards}", family="mllama", method=method, images=2, engine="tensorrt-rtx", engine_shards=shards
        )
    )
    assert len(cut.contract.chain("decoder")) == shards
    recorded = []
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        session = Session(cut, backend)
        talk = [[256, *TEXT[:3], IMAGE, *TEXT[3:9]], TEXT[9:12], [*TEXT[12:14], IMAGE, *TEXT[14:20]]]
        images = [(picture(0, (100, 50)),), (), (picture(1),)]
        for ids, brought in zip(talk, images, strict=True):
            prefill = session.prefill([ids], session.processor(brought) if brought else None)
            recorded.append([prefill.logits, prefill.kept_features, [session.decode(np.array([65])) for _ in range(3)]])
        recorded.append([session.cache_contents(0)])
    np.testing.assert_equal(recorded[:4], recorded[4:])


@pytest.mark.slow
def test_bfloat16_engines_build(export_tiny):
    """The published models' dtype."""
    folder = export_tiny("bf", family="mllama", method="trimmed-llama", dtype="bfloat16", engine="tensorrt-rtx")
    assert {"vision.engine", "embed.engine", "decoder.engine"} <= {path.name for path in folder.iterdir()}


def test_a_bound_that_keeps_nothing_is_refused(tmp_path, capsys):
    argv = ["--model", "tiny:mllama", "--method", "trimmed-llama", "--output", str(tmp_path / "b")]
    assert cli.main([*argv, "--ratio", "0.004"]) == 2
    assert "keeps none of a picture's 68 features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "flag"), [("trimmed-llama", "--k"), ("trimmed-llama", "--score"), ("none", "--r"), ("fastv", "--bound")]
)
def test_an_argument_of_another_method_is_refused(method, flag, tmp_path, capsys):
    value = "no-rope" if flag == "--score" else "1"
    assert cli.main(["--model", "demo", "--method", method, flag, value, "--output", str(tmp_path / "b")]) == 2
    assert f"{flag} belongs to --method" in capsys.readouterr().err


# meta-llama/Llama-3.2-11B-Vision-Instruct: 40 layers, 8 of them cross-attention, 8 key/value heads of 128; a picture
# is 4 tiles of 40 x 40 patches and a class token, 6,404 features.
TEXT_11B = {"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "max_position_embeddings": 131072}
VISION_11B = {"image_size": 560, "intermediate_layers_indices": [3, 7, 15, 23, 30], "vision_output_dim": 7680}
MB_PER_FEATURE = 2 * 8 * 8 * 128 * 2 / 1e6  # key and value, layers, heads, size, float16


@pytest.mark.parametrize(("ratio", "features"), [(None, 6404), (0.25, 5603), (0.5, 6404), (0.1, 2241)])
def test_cache_memory_of_11b_from_its_config(ratio, features, tmp_path):
    """What --dry-run prints of it, without weights and without a trace."""
    from transformers import MllamaConfig

    MllamaConfig(vision_config=VISION_11B, text_config=TEXT_11B, dtype="bfloat16").save_pretrained(tmp_path)
    method = None if ratio is None else TrimmedLlama(ratio=ratio)
    prepared = pipeline.prepare(Job(model="11b", output="", dtype="float16", method=method), tmp_path, None)
    tokens, images = prepared.contract.groups
    assert (len(tokens.layers), len(images.layers), images.capacity) == (32, 8, features)
    printed = "\n".join(prepared.plan_lines)
    assert f"{features * MB_PER_FEATURE:10.1f} MB  (8 of layers 3-38, {features} image features, batch 1)" in printed
    dense = 2 * 32 * 8 * 128 * 2 * 2048 / 1e6 + 6404 * MB_PER_FEATURE
    assert f"unpruned: {dense:.1f} MB" in printed
    assert 10.6e9 < sum(p.numel() for p in prepared.model.parameters()) < 10.7e9
