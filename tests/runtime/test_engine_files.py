"""Engines of a finished bundle: what they are made for, how they are built again, how they are refused."""

import dataclasses
import json

import pytest
from fake_machine import Machine

from vlmtrim import runtime
from vlmtrim.graphs.bundle import BundleError, open_bundle, seal
from vlmtrim.runtime.backends import tensorrt
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.engines import fingerprint, profiles
from vlmtrim.runtime.errors import RuntimeRefusal

NAMES = {"vision.engine", "embed.engine", "decoder.engine"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "home")


@pytest.fixture
def built(machine, fastv_bundle, tmp_path):
    return machine.with_engines(fastv_bundle, tmp_path / "bundle")


def refusal(folder, library="tensorrt"):
    with pytest.raises(RuntimeRefusal) as caught:
        runtime.Session(open_bundle(folder), tensorrt.TrtBackend(library))
    return str(caught.value)


def test_building_again_seals_the_bundle_again(built):
    bundle = open_bundle(built)
    assert {*NAMES, fingerprint.FILE} <= set(bundle.sums)
    assert fingerprint.library_of(built) == "tensorrt"
    prints = fingerprint.read(built)
    assert set(prints) == NAMES and prints["vision.engine"].compute_capabilities == ("8.9",)
    assert list(prints["decoder.engine"].profiles) == ["prefill", "decode"]
    first = bundle.digest
    engines.rebuild(built, "tensorrt")
    assert open_bundle(built).sums.keys() == bundle.sums.keys() and first


def test_a_build_that_ends_early_leaves_a_whole_bundle_without_engines(built, monkeypatch):
    def stop(trt, library, onnx, *_):
        if onnx.name == "decoder.onnx":
            raise KeyboardInterrupt
        return memoryview(b"half"), []

    monkeypatch.setattr(engines, "_build", stop)
    with pytest.raises(KeyboardInterrupt):
        engines.rebuild(built, "tensorrt")
    assert not NAMES & set(open_bundle(built).sums)
    assert "has no engines; build them with" in refusal(built)


def test_the_command_builds_and_refuses_in_one_line(built, capsys, monkeypatch, tmp_path):
    assert engines.main([str(built), "--library", "tensorrt"]) == 0
    capsys.readouterr()
    assert engines.main([str(tmp_path / "nowhere"), "--library", "tensorrt"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("engines: ") and "is no bundle" in error and error.count("\n") == 1
    (built / "contract.json").write_text("{}")
    with pytest.raises(BundleError, match=r"contract\.json"):
        engines.rebuild(built, "tensorrt")
    monkeypatch.undo()
    assert engines.main([str(built), "--library", "tensorrt"]) == 1
    assert "vlmtrim[tensorrt]" in capsys.readouterr().err


def test_a_bundle_without_engines_names_the_command(machine, fastv_bundle):
    command = f"python -m vlmtrim.runtime.engines {fastv_bundle} --library tensorrt"
    assert refusal(fastv_bundle) == f"{fastv_bundle} has no engines; build them with: {command}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"library": "tensorrt-rtx", "version": "1.7.1"}, r"is made for tensorrt-rtx 1.7.1, this is tensorrt 10.15.1"),
        ({"version": "10.14.0"}, r"is made for tensorrt 10.14.0, 10.15.1 is installed"),
        ({"compute_capabilities": ["9.0", "12.0"]}, r"compute capability 9.0, 12.0, this one has 8.9"),
        ({"onnx_sha256": "0" * 64}, r"was built from another decoder.onnx"),
        ({"bytes": 7}, r"bytes instead of 7"),
    ],
)
def test_an_engine_made_for_something_else_is_refused_with_the_command(built, changes, says):
    entries = json.loads((built / fingerprint.FILE).read_text())
    entries["decoder.engine"] |= changes
    (built / fingerprint.FILE).write_text(json.dumps(entries))
    seal(built)
    said = refusal(built)
    assert said.startswith("decoder.engine ") and says in said
    assert said.endswith(f"build it again with: python -m vlmtrim.runtime.engines {built} --library tensorrt")


def test_portable_engines_run_from_ampere_on(built):
    entry = dataclasses.replace(fingerprint.read(built)["decoder.engine"], compute_capabilities=())
    assert [entry.runs_on(gpu) for gpu in ((7, 5), (8, 0), (9, 0), (12, 1))] == [False, True, True, True]
    again = fingerprint.Fingerprint.from_json(json.loads(json.dumps(entry.to_json())))
    assert again == entry


def test_a_damaged_list_of_engines_is_refused(built):
    for text in ("no json", "[]", '{"decoder.engine": {}}', '{"decoder.engine": 3}'):
        (built / fingerprint.FILE).write_text(text)
        with pytest.raises(RuntimeRefusal, match=r"engines\.json is damaged"):
            fingerprint.read(built)


def test_an_engine_that_does_not_load_says_where_and_why(built):
    size = (built / "embed.engine").stat().st_size
    (built / "embed.engine").write_bytes(b"x" * size)
    seal(built)
    said = refusal(built)
    assert "does not load embed.engine on Fake GPU (compute capability 8.9): not an engine" in said
    assert "--library tensorrt" in said


def test_engines_with_other_profiles_than_listed_are_refused(built):
    entries = json.loads((built / fingerprint.FILE).read_text())
    del entries["decoder.engine"]["profiles"]["decode"]
    (built / fingerprint.FILE).write_text(json.dumps(entries))
    seal(built)
    assert "decoder.engine does not match engines.json (2 profiles" in refusal(built)


def test_timings_are_kept_between_builds(fastv_bundle, tmp_path, monkeypatch):
    """TensorRT's timing cache: given to every build, written after it. The calls are those of the real library."""
    trt = engines.import_library("tensorrt-rtx")
    machine_home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine_home))
    monkeypatch.setattr(engines, "_capabilities", lambda config, library: ["8.9"])
    bundle = open_bundle(fastv_bundle)
    spec, ranges = bundle.contract.graphs["embed"], profiles.decoder_profiles(bundle.contract)
    engine, _ = engines._build(trt, "tensorrt", bundle.file(spec.file), spec, ranges)
    (kept,) = (machine_home / "vlmtrim" / "tensorrt").iterdir()
    assert len(engine) > 100_000 and kept.name == f"timing-{trt.__version__}-8.9.cache" and kept.stat().st_size
    assert engines._build(trt, "tensorrt", bundle.file(spec.file), spec, ranges)[0]


def test_the_last_profile_that_admits_a_step_is_taken(fastv_bundle):
    both = profiles.decoder_profiles(open_bundle(fastv_bundle).contract)
    assert profiles.choose(both, {"B": 2, "S": 1, "N": 0, "W0": 7}, "decoder.onnx") == "decode"
    assert profiles.choose(both, {"B": 1, "S": 1, "N": 16}, "decoder.onnx") == "prefill"
    assert profiles.choose(both, {"B": 1, "S": 3, "N": 0}, "decoder.onnx") == "prefill"
    with pytest.raises(RuntimeRefusal, match=r"decoder\.onnx.*prefill: B is 3, 1 to 2 fit, W0 is 600, 1 to 512 fit"):
        profiles.choose(both, {"B": 3, "S": 1, "N": 0, "W0": 600}, "decoder.onnx")
    assert profiles.from_json(profiles.to_json(both)) == both


@pytest.mark.parametrize(
    ("length", "capacity", "expected"), [(1, 2048, 128), (128, 2048, 128), (129, 2048, 256), (200, 201, 201), (5, 5, 5)]
)
def test_live_windows_come_in_buckets(length, capacity, expected):
    assert profiles.bucket(length, capacity) == expected
