"""TensorRT and TensorRT-RTX in C++, on stand-ins that run the bundle's own ONNX files; see test_session as well."""

import json
import os
import subprocess

import numpy as np
import pytest
from probing import Native, ProbeError, build_folder
from stand_ins import VERSIONS
from test_session import ON_ENGINES, three_turns

from vlmtrim.graphs.bundle import seal
from vlmtrim.runtime.engines import fingerprint
from vlmtrim.runtime.errors import RuntimeRefusal


@pytest.mark.parametrize("cuda_graphs", ["auto", "capture", "off"])
def test_tensorrt_rtx_to_the_bit(fastv_bundle, place, tmp_path, cuda_graphs):
    """It replays by itself, can be captured with its final kernels, or launches plainly."""
    here = place("tensorrt-rtx")
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    native = Native(folder, backend="tensorrt-rtx", cuda_graphs=cuda_graphs)
    three_turns(folder, native, buckets=True)
    native.close()
    own, eager = here.count("replayed by the library"), here.count("eager")
    assert (own, eager) == {"auto": (2, 0), "capture": (0, 2), "off": (0, 0)}[cuda_graphs]
    assert (here.count("replays") > 20) == (cuda_graphs == "capture")


def test_compiled_kernels_are_kept_for_the_next_start(fastv_bundle, place, tmp_path):
    here = place("tensorrt-rtx")
    folder, kept = here.with_engines(fastv_bundle, tmp_path / "bundle"), tmp_path / "home/vlmtrim/tensorrt-rtx"
    for start in range(2):
        native = Native(folder, backend="tensorrt-rtx")
        native.prefill([3, 4, 5])
        native.close()
        assert here.count("kernels found") == 2 * start
        assert sorted(path.name.split("-")[0] for path in kept.iterdir()) == ["decoder", "embed"]
    for path in kept.iterdir():
        path.write_bytes(b"of another driver")
    native = Native(folder, backend="tensorrt-rtx")
    native.prefill([3, 4, 5])
    native.close()
    assert here.count("kernels found") == 2


def test_a_decode_step_waits_once_and_allocates_nothing(export_tiny, place, tmp_path):
    """Three engines and the embedding: ids, position and write indices go up, logits come down."""
    family, fields = ON_ENGINES["chained"]
    bundle = export_tiny("cpp-chained", family=family, **fields)
    here = place()
    native = Native(here.with_engines(bundle, tmp_path / "bundle"), backend="tensorrt")
    native.prefill(list(range(3, 20)))
    for token in range(5):
        native.decode(30 + token)
    names = ("waits", "copies out", "cudaMalloc", "graphs", "replays")
    before = [here.count(name) for name in names]
    for token in range(10):
        native.decode(40 + token)
    assert [here.count(name) - start for name, start in zip(names, before, strict=True)] == [10, 10, 0, 0, 30]
    native.close()


@pytest.mark.parametrize("capture", [1, 2])
def test_where_capture_is_refused_steps_are_launched_plainly_and_it_is_said_once(
    fastv_bundle, place, tmp_path, capfd, capture
):
    here = place()
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    here.begin(capture=capture)
    native = Native(folder, backend="tensorrt")
    three_turns(folder, native, buckets=True)
    native.close()
    said = [line for line in capfd.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert len(said) == 1 and said[0].startswith("no CUDA graphs: ") and "kernel by kernel" in said[0]
    assert here.count("replays") == 0


def test_two_conversations_share_a_model(fastv_bundle, place, tmp_path):
    """Sessions take turns on one stream: what one computes does not depend on the other."""
    here = place()
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    first, second = (Native(folder, backend="tensorrt") for _ in range(2))
    ids = [np.arange(3, 40), np.arange(50, 60)]
    together = [[native.prefill(one)["logits"]] for native, one in zip((first, second), ids, strict=True)]
    for token in range(6):
        for native, found in zip((first, second), together, strict=True):
            found.append(native.decode(70 + token)[0])
    for native, one, found in zip((first, second), ids, together, strict=True):
        native.reset()
        alone = [native.prefill(one)["logits"], *(native.decode(70 + token)[0] for token in range(6))]
        np.testing.assert_array_equal(alone, found)
        native.close()


def edited(folder, change):
    """engines.json changed, and the bundle sealed again."""
    entries = json.loads((folder / fingerprint.FILE).read_text())
    change(entries)
    (folder / fingerprint.FILE).write_text(json.dumps(entries))
    seal(folder)


FOREIGN = {
    "library": lambda e: e["decoder.engine"].update(library="tensorrt-rtx", version="1.5.0"),
    "version": lambda e: e["decoder.engine"].update(version="10.14.1.1"),
    "capability": lambda e: e["embed.engine"].update(compute_capabilities=["9.0", "10.0"]),
    "portable": lambda e: None,
    "graph": lambda e: e["vision.engine"].update(onnx_sha256="0" * 64),
    "size": lambda e: e["decoder.engine"].update(bytes=7),
    "missing": lambda e: e.pop("embed.engine"),
    "none": lambda e: e.clear(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_engines_for_something_else_are_refused_as_in_python(name, fastv_bundle, place, tmp_path):
    here, capability = place(), (8, 9)
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    edited(folder, FOREIGN[name])
    if name == "portable":
        edited(folder, lambda e: [entry.update(compute_capabilities=[]) for entry in e.values()])
        capability = (7, 5)
        here.begin(capability)
    with pytest.raises(RuntimeRefusal) as expected:
        for graph in ("vision", "embed", "decoder"):
            fingerprint.find(folder, graph, "tensorrt", VERSIONS["tensorrt"], capability)
    with pytest.raises(ProbeError) as found:
        Native(folder, backend="tensorrt")
    assert str(found.value) == str(expected.value)


def test_a_bundle_without_engines_is_refused_as_in_python(fastv_bundle, place):
    place()
    with pytest.raises(RuntimeRefusal) as expected:
        fingerprint.find(fastv_bundle, "vision", "tensorrt", VERSIONS["tensorrt"], (8, 9))
    with pytest.raises(ProbeError) as found:
        Native(fastv_bundle, backend="tensorrt")
    assert str(found.value) == str(expected.value)
    Native(fastv_bundle, backend="auto").close()  # goes on to ort-cpu


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["decoder.engine"]["profiles"]["prefill"].update(S=[5, 2, 9]),
        lambda e: e["decoder.engine"]["profiles"]["prefill"].update(S="long"),
        lambda e: e["decoder.engine"].update(profiles={}),
        lambda e: e["decoder.engine"].pop("bytes"),
        lambda e: e["decoder.engine"].update(more=1),
        lambda e: e.update({"decoder.engine": 3}),
    ],
)
def test_damaged_fingerprints_are_refused(change, fastv_bundle, place, tmp_path):
    folder = place().with_engines(fastv_bundle, tmp_path / "bundle")
    edited(folder, change)
    with pytest.raises(ProbeError, match=r"engines\.json is damaged \(.*\); build the engines again"):
        Native(folder, backend="tensorrt")


def test_an_engine_that_does_not_load_says_what_the_library_says(fastv_bundle, place, tmp_path):
    folder = place().with_engines(fastv_bundle, tmp_path / "bundle")
    size = (folder / "decoder.engine").stat().st_size
    (folder / "decoder.engine").write_bytes(b"x" * size)
    seal(folder)
    said = (
        r"tensorrt 10\.15\.1\.29 does not load decoder\.engine on Fake GPU \(compute capability 8\.9\): not an engine"
    )
    with pytest.raises(ProbeError, match=said):
        Native(folder, backend="tensorrt")


def test_an_engine_of_another_graph_is_refused(fastv_bundle, place, tmp_path):
    here = place()
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    (folder / "embed.engine").write_bytes((folder / "vision.engine").read_bytes())
    edited(folder, lambda e: e["embed.engine"].update(bytes=(folder / "embed.engine").stat().st_size))
    with pytest.raises(ProbeError, match=r"embed\.engine does not match engines\.json \(1 profiles"):
        Native(folder, backend="tensorrt")
    edited(folder, lambda e: e["embed.engine"]["profiles"].pop("decode"))
    with pytest.raises(ProbeError, match=r"embed\.engine: the graph has image_features as .*, the contract promises"):
        Native(folder, backend="tensorrt")


def test_a_step_outside_the_profiles_is_refused_before_the_launch(fastv_bundle, place, tmp_path):
    folder = place().with_engines(fastv_bundle, tmp_path / "bundle")
    edited(folder, lambda e: e["decoder.engine"]["profiles"]["prefill"].update(S=[1, 32, 64]))
    native = Native(folder, backend="tensorrt")
    with pytest.raises(ProbeError, match=r"decoder\.onnx: .*S is 65, 1 to 64 fit.*shorten the prompt"):
        native.prefill([1] * 65)
    assert native.prefill([1] * 64)["logits"].shape == (272,)
    native.close()


def test_what_does_not_fit_on_the_gpu_says_how_much_is_missing(fastv_bundle, place, tmp_path):
    here = place()
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    here.begin(memory=200_000)
    with pytest.raises(ProbeError, match=r"Fake GPU has .* GB free, .* GB more are needed for caches"):
        Native(folder, backend="tensorrt")


@pytest.mark.parametrize(
    ("error", "version", "said"),
    [
        (35, 0, "no NVIDIA driver is loaded here"),
        (35, 12020, r"supports CUDA 12\.2, this library is made for 13\.0"),
        (100, 13000, "finds no GPU; check nvidia-smi"),
        (1, 13000, "CUDA does not start here"),
    ],
)
def test_a_machine_without_a_gpu_says_so(error, version, said, fastv_bundle, place, tmp_path):
    here = place()
    folder = here.with_engines(fastv_bundle, tmp_path / "bundle")
    here.driver(error, version)
    with pytest.raises(ProbeError, match=said):
        Native(folder, backend="tensorrt")
    Native(folder, backend="auto").close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nowhere/libnvinfer.so.10", "the library of tensorrt is not found .* set VLMTRIM_TENSORRT to the path"),
        ("stand_in/libstand_in_cuda.so", "has no getInferLibMajorVersion"),
        ("stand_in/libstand_in_tensorrt_rtx.so", r"tensorrt 1\.7\.1\.116 is here, this program is made for 10\.15"),
    ],
)
def test_a_library_that_is_not_the_right_one_is_refused(path, said, fastv_bundle, place, monkeypatch):
    place()
    monkeypatch.setenv("VLMTRIM_TENSORRT", str(build_folder() / path))
    with pytest.raises(ProbeError, match=said):
        Native(fastv_bundle, backend="tensorrt")


def test_cuda_graphs_are_of_these_backends(fastv_bundle, place):
    place()
    with pytest.raises(ProbeError, match="cuda_graphs is of the TensorRT backends, not of ort-cpu; leave it out"):
        Native(fastv_bundle, cuda_graphs="off")
    with pytest.raises(ProbeError, match="give one of auto, capture, off"):
        Native(fastv_bundle, backend="tensorrt", cuda_graphs="sometimes")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "auto"])
def test_the_tool_answers_the_same_on_every_backend(backend, demo_bundle, place, tmp_path):
    """vlmtrim-run with a libvlmtrim that has the stand-ins' backends."""
    here = place("tensorrt" if backend == "auto" else backend)
    folder = here.with_engines(demo_bundle, tmp_path / "bundle")
    built = build_folder()
    answers = []
    for arguments in (["--backend", "ort-cpu"], ["--backend", backend, "--cuda-graphs", "auto"]):
        command = [built / "vlmtrim-run", folder, "--prompt", "What is it?", "--max-new-tokens", "6", "--json"]
        environment = {**os.environ, "LD_PRELOAD": str(built / "stand_in/libvlmtrim.so.0")}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[1]["backend"] == here.backend


def test_a_library_without_the_backend_says_so(demo_bundle):
    command = [build_folder() / "vlmtrim-run", demo_bundle, "--prompt", "What?", "--backend", "tensorrt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "is not in this library; supported: auto, ort-cuda, ort-cpu" in done.stderr
