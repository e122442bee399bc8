"""Caches of layers that see a window: as long as the window and a step, moved as often as it takes; else nothing new.

Gemma 3 with a window of 24 entries, conversations of 512 tokens in steps of 56: caches of 80 entries in place of 512.
"""

import json

import numpy as np
import pytest
from alone import answer_alone, assert_same
from parity import assert_parity
from qwen_turns import sized

from vlmtrim import runtime
from vlmtrim.export import cli, pipeline
from vlmtrim.export.families import gemma3
from vlmtrim.export.job import Job
from vlmtrim.export.oracles.reference_gemma3 import Reference
from vlmtrim.export.weights import large
from vlmtrim.graphs import agreement
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.methods import make_method
from vlmtrim.graphs.reading import BundleError
from vlmtrim.runtime import Engine, Image, Message, Prompt
from vlmtrim.runtime.engines import fingerprint
from vlmtrim.runtime.measure import bench
from vlmtrim.runtime.measure.check import Parity, Recording, Turn, compare, record
from vlmtrim.runtime.measure.watch import watch
from vlmtrim.runtime.select_backend import make_backend
from vlmtrim.runtime.session import Session

WINDOW, STEP, LENGTH = 24, 56, 512
PICTURE = [261, *[263] * 16, 262]
FIELDS = {"family": "gemma3", "max_seq_len": LENGTH, "max_input_len": STEP, "images": 2}


@pytest.fixture(scope="module")
def bundles(export_tiny):
    return lambda method: open_bundle(export_tiny("windows", method=method, max_batch=3, **FIELDS))


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("fastv")


def test_layers_of_every_kind_on_either_side_of_a_selection_are_a_group(bundle):
    found = [(group.layers, group.capacity, group.window, group.removed) for group in bundle.contract.groups]
    assert found == [
        ((0,), WINDOW + STEP, WINDOW, 0.0),
        ((1,), LENGTH, 0, 0.0),
        ((2,), WINDOW + STEP, WINDOW, 0.5),
        ((3,), LENGTH - 16, 0, 0.5),
    ]
    assert bundle.contract.dims["S"] == (1, STEP) and bundle.contract.dims["N"] == (0, STEP)
    assert bundle.contract.wholes[3:] == ("shift-2-80-64",)


def talk():
    """Three turns of two rows: ids of other lengths, a picture each in the first two, in other places."""
    random = np.random.default_rng(0)
    words = lambda count: random.integers(0, 250, count).tolist()  # noqa: E731
    yield [[256, *words(3), *PICTURE, *words(2)], [256, *words(14), *PICTURE, *words(6)]], (1, 2)
    yield [[*words(10), *PICTURE, *words(11)], [*PICTURE, *words(2)]], (3, 4)
    yield [words(4), words(40)], ()


@pytest.mark.parametrize("steps", [30, pytest.param(120, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["none", "fastv"])
def test_rows_of_a_batch_equal_transformers_over_many_moves(bundles, method, steps):
    """Of none its own forward, of fastv the oracle, whose caches hold everything; each row as if alone."""
    bundle, moves = bundles(method), []
    backend = watch(make_backend("ort-cpu"), lambda name, feeds, run: moves.append(name) or run(feeds))
    session = Session(bundle, backend, batch=2)
    selection = bundle.contract.selection
    reference = Reference(gemma3.MODEL_CLASS, bundle.folder, selection and dict(selection))
    turns = [(rows, tuple(sized(240, 200, seed) for seed in seeds)) for rows, seeds in talk()]
    expected = [
        [
            reference.record(Turn("", ids[row], images[row : row + 1], not i), steps)
            for i, (ids, images) in enumerate(turns)
        ]
        for row in range(2)
    ]
    groups = [group.layers for group in bundle.contract.groups]
    windows = {layer: group.window for group in bundle.contract.groups if group.window for layer in group.layers}
    for (rows, images), *wanted in zip(turns, *expected, strict=True):
        prefill = session.prefill(rows, session.processor(images) if images else None)
        caches = [session.cache_contents(row) for row in range(2)]
        fed = zip(*(tokens for _, tokens in wanted), strict=True)
        logits = [prefill.logits, *(session.decode(np.array(tokens)) for tokens in fed)]
        for row, (want, _) in enumerate(wanted):
            kept = None if prefill.kept_indices is None else prefill.kept_indices[row]
            found = Recording(kept, caches[row], np.stack([step[row] for step in logits]), windows=windows)
            assert Parity(tuple(compare("turn", found, want, groups, "float32")))
    near = [index for index, group in enumerate(bundle.contract.groups) if group.window]
    assert sum(name == "shift-2-80-64" for name in moves) >= len(near) * (3 * steps // STEP)
    assert all(session.lengths.entries[index].max() <= WINDOW + STEP for index in near)
    assert session.lengths.positions.min() > 3 * steps + WINDOW


def test_check_vlm_compares_what_is_still_there(bundle, capsys):
    assert_parity(bundle.folder, capsys, "--tokens", "50", "--prompt", "a")


def test_a_window_moves_to_the_front_whole(bundle):
    """Rows that hold more than the window, overlapping its new place, and less."""
    backend, (group, *_) = make_backend("ort-cpu"), bundle.contract.groups
    graph = backend.open(bundle.folder, bundle.contract, group.shift)
    old = np.random.default_rng(0).standard_normal((2, 3, 2, group.capacity, 64)).astype(np.float32)
    caches = {f"past_key_values.{kind}": backend.zeros(old.shape[1:], "float32") for kind in ("key", "value")}
    for cache, values in zip(caches.values(), old, strict=True):
        cache.update_inplace(values)
    graph.bind_caches(caches)
    first = np.array([40, 5, 0])
    graph.run({"first_kept": first})
    for cache, values in zip(caches.values(), old, strict=True):
        for row, start in enumerate(first):
            found = backend.to_host(cache)[row]
            np.testing.assert_array_equal(found[:, :WINDOW], values[row, :, start : start + WINDOW])
            np.testing.assert_array_equal(found[:, WINDOW:], values[row, :, WINDOW:])


def test_slots_whose_windows_move_answer_as_alone(bundle):
    alone = Session(bundle, make_backend("ort-cpu", threads=1))
    with Engine(bundle, make_backend("ort-cpu", threads=1), slots=3) as engine:
        requests = []
        for number, tokens in enumerate((90, 50, 70, 60)):
            question = Prompt(*[Image(sized(90, 60, number))] * (number % 2), "abcd"[number:])
            requests.append(engine.prepare([Message("user", question)], max_new_tokens=tokens))
        answers = [engine.submit(request) for request in requests]
        expected = [answer_alone(alone, request) for request in requests]
        for answer, want in zip(answers, expected, strict=True):
            assert_same(list(answer), want)
        said = [len(request.ids) + len(want["ids"]) for request, want in zip(requests, expected, strict=True)]
        assert sum(length > WINDOW + STEP for length in said) > 1 and engine.state().finished == 4


def test_bench_counts_the_moves_with_the_steps_that_need_them(bundle):
    work = bench.Work("a", (sized(90, 60),), None, 90, rounds=1, warmup=0)
    subject = bench.Subject(bundle.folder, "ort-cpu", work)
    sample = subject.run()
    assert len(sample.decode) == 89 and sum(span[0].startswith("shift") for span in subject._spans) == 2
    spent = [subject.backend.elapsed(*span[1:]) for span in subject._spans[3:]]  # behind vision, embed and decoder
    assert sum(sample.decode) == pytest.approx(sum(spent))
    subject.samples.append(sample)
    assert bench.memory(subject)["caches_as_predicted"]


def test_every_engine_of_a_chain_in_stages_builds_and_runs_like_the_whole(export_tiny):
    """Float16, both profiles; what a stage leaves has its group's number. On ONNX Runtime, to the bit."""
    stages = ((1, 0.5), (2, 0.25), (3, 0.125))
    fields = {**FIELDS, "dtype": "float16", "engine": "tensorrt-rtx", "engine_shards": 3, "max_batch": 2}
    bundle = open_bundle(export_tiny("windows-chain", method="pyramid", stages=stages, **fields))
    prints = fingerprint.read(bundle.folder)
    assert set(prints["decoder-2.engine"].profiles) == {"prefill", "decode"}
    assert set(prints["shift-2-80-64.engine"].profiles) == {"rows"}
    found = []
    for chained in (False, True):
        backend = make_backend("ort-cpu")
        backend.chained = chained
        session = Session(bundle, backend)
        logits = [session.prefill([[256, 3, *PICTURE, 7]], session.processor((sized(90, 60),))).logits]
        logits += [session.decode(np.array([token])) for token in range(50)]
        found.append(np.stack(logits))
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "fastv", "guided"])
def test_engines_of_float16_build(export_tiny, method):
    fields = {**FIELDS, "dtype": "float16", "engine": "tensorrt-rtx", "max_batch": 2}
    prints = fingerprint.read(export_tiny("windows-engine", method=method, **fields))
    assert {"decoder.engine", "shift-2-80-64.engine"} <= set(prints)
    assert set(prints["decoder.engine"].profiles) == {"prefill", "decode"}


def test_a_text_longer_than_a_step_goes_in_several(bundle):
    """Behind a picture, in a conversation that goes on: as the oracle takes it, in one."""
    session = Session(bundle, make_backend("ort-cpu"))
    reference = Reference(gemma3.MODEL_CLASS, bundle.folder, dict(bundle.contract.selection))
    text = np.random.default_rng(1).integers(0, 250, 2 * STEP + 7).tolist()
    for turn in (Turn("picture", [256, *PICTURE, 9], (sized(90, 60),)), Turn("text", text, opens=False)):
        expected, tokens = reference.record(turn, 3)
        found, _ = record(session, turn, tokens)
        groups = [group.layers for group in bundle.contract.groups]
        assert Parity(tuple(compare(turn.name, found, expected, groups, "float32")))
    assert len(found.kept) == len(text)


def test_a_prompt_longer_than_a_step_is_refused_by_name(bundle):
    session = Session(bundle, make_backend("ort-cpu"), batch=2)
    for part, said in (([], r"\(0 visual\), a step with 2 rows"), (PICTURE, r"\(16 visual\), a step with pictures")):
        ids = [256, *part] + [9] * (STEP - len(part))
        pictures = session.processor((sized(90, 60), sized(90, 60))) if part else None
        with pytest.raises(runtime.RuntimeRefusal, match=rf"57 tokens {said} takes 56: .*--max-input-len"):
            session.prefill([ids, ids], pictures)
    assert session.lengths.positions.tolist() == [0, 0]
    with pytest.raises(runtime.RuntimeRefusal, match="of 64 visual tokens for one prompt; a step of 56 tokens holds"):
        list(runtime.Chat(Session(bundle, session.backend)).generate("a", [sized(90, 60)] * 4))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["tiny:gemma3", "--max-input-len", "16"],
            "give more than the 16 tokens of a picture, up to --max-seq-len",
        ),
        (["tiny:gemma3", "--max-input-len", "2000"], "--max-input-len is 2000; give more than"),
        (["tiny:llava", "--max-input-len", "64"], "which this model has not; leave it out"),
        (["tiny:gemma3", "--max-input-len", "64", "--cache", "snapkv"], "--cache snapkv judges all entries of a"),
        (
            ["tiny:gemma3", "--max-input-len", "64", "--method", "none", "--emit-guide"],
            "--emit-guide returns attention",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(argv, said, capsys):
    assert cli.main(["--model", *argv, "--max-seq-len", "1024", "--dry-run"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["groups"][0].update(window=25), "groups[0].capacity is 80; its window and the longest step"),
        (lambda raw: raw["groups"][1].update(window=8), "graphs.shift-2-512-64 is not what caches with a window need"),
        (lambda raw: raw["graphs"].pop("shift-2-80-64"), "graphs.shift-2-80-64 is not what caches with a window need"),
        (lambda raw: [group.update(window=8) for group in raw["groups"]], "no group is filled by tokens and holds all"),
        (lambda raw: raw["dims"].update(S=[1, 57]), "groups[0].capacity is 80; its window and the longest step"),
    ],
)
def test_contracts_that_do_not_agree_are_refused(bundle, change, said):
    raw = json.loads(bundle.contract.to_json())
    change(raw)
    with pytest.raises(BundleError) as refusal:
        agreement.check(Contract.from_json(json.dumps(raw)))
    assert said in str(refusal.value)


@pytest.mark.parametrize(("longest", "groups"), [(2048, 3), (8192 - 1024, 2), (8192, 2), (None, 2)])
def test_layers_stay_together_where_nothing_is_saved(longest, groups, tmp_path):
    """The published 4B: 8,192 tokens, a window of 1,024."""
    large.write_config(tmp_path, large.config_of("gemma3-4b"))
    job = Job(str(tmp_path), "", make_method("fastv"), max_seq_len=8192, max_input_len=longest)
    contract = pipeline.prepare(job, tmp_path, None).contract
    assert len(contract.groups) == groups and sum(len(group.layers) for group in contract.groups) == 34
    if groups == 3:
        assert [(len(g.layers), g.capacity) for g in contract.groups if g.window] == [(2, 3072), (27, 3072)]
