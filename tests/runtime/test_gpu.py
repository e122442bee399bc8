"""What needs an NVIDIA GPU: pytest -m gpu -rs

A library that is not installed, or does not load here, skips its tests with the reason: whether TensorRT-RTX takes the
GPU at all is the first question, and test_which_backends_start prints the answer.
"""

import gc

import numpy as np
import pytest
from parity import FIELDS, combinations

from vlmtrim import runtime
from vlmtrim.export import check_cli
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.caches import load_policy
from vlmtrim.graphs.formats import format_names
from vlmtrim.graphs.packed import WITHOUT_ENGINES
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.select_backend import BACKENDS, make_backend

pytestmark = pytest.mark.gpu


def started(name, *args):
    """A backend, or a skip with the reason."""
    try:
        if args:
            from vlmtrim.runtime.backends.tensorrt import TrtBackend

            return TrtBackend(name, *args)
        return make_backend(name)
    except RuntimeRefusal as refusal:
        pytest.skip(f"{name}: {refusal}")


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def library(request):
    started(request.param)
    return request.param


@pytest.fixture(scope="module")
def bundle(library, export_tiny):
    """A float16 bundle with engines built here, in one piece."""
    return open_bundle(export_tiny(f"gpu-{library}", k=2, r=0.5, dtype="float16", engine=library, max_batch=2))


@pytest.fixture(scope="module")
def chained(library, export_tiny):
    return open_bundle(
        export_tiny(f"gpu-chain-{library}", k=2, r=0.5, dtype="float16", engine=library, engine_shards=2, max_batch=2)
    )


@pytest.fixture(autouse=True)
def kept_apart(tmp_path, monkeypatch):
    """Kernels and timings of the tests stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def answers(session, picture, tokens=12):
    """Token ids and logits of a conversation of two turns: prefills and decode steps."""
    chat = runtime.Chat(session)
    logits, decode = [], session.decode
    session.decode = lambda *args: logits.append(decode(*args)) or logits[-1]
    ids = []
    for question, images in (("What is it?", [[picture]] * session.batch), ("And why?", [])):
        questions = [question, f"{question} Say it in one word."][: session.batch]
        for step in chat.generate(questions, images, max_new_tokens=tokens):
            ids.append(step.token_ids)
        logits.append(step.prefill.logits)
    return ids, np.concatenate(logits).astype(np.float32)


def test_which_backends_start(capsys):
    for name in BACKENDS:
        try:
            backend = make_backend(name)
            device = getattr(backend, "device", None)
            said = f"starts ({device.name}, compute capability {device.capability})" if device else "starts"
        except RuntimeRefusal as refusal:
            said = str(refusal)
        with capsys.disabled():
            print(f"\n{name}: {said}", end="")


def test_onnxruntime_cuda_equals_pytorch(fastv_bundle):
    started("ort-cuda")
    assert check_cli.main([str(fastv_bundle), "--backend", "ort-cuda"]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_onnxruntime_cuda_runs_half_precision(export_tiny, dtype, picture):
    backend = started("ort-cuda")
    folder = export_tiny(f"gpu-ort-{dtype}", k=2, r=0.5, dtype=dtype)
    _, logits = answers(runtime.Session(open_bundle(folder), backend), picture)
    assert np.isfinite(logits).all()
    assert check_cli.main([str(folder), "--backend", "ort-cuda"]) == 0


def test_engines_load_with_both_profiles(bundle, library):
    """TensorRT-RTX compiles the GPU part on the target."""
    backend = started(library)
    for name in ("vision", "embed", "decoder"):
        engine = backend._load(bundle.file(f"{name}.engine"))
        listed = backend._fingerprint(bundle.folder, name).profiles
        assert engine.num_optimization_profiles == len(listed)
        spec = bundle.contract.graphs[name]
        assert {tensor.name for tensor in spec.outputs} <= {
            engine.get_tensor_name(i) for i in range(engine.num_io_tensors)
        }
        for index, ranges in enumerate(listed.values()):
            for tensor in spec.inputs:
                shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index)]
                assert shapes == list(profiles.shapes(tensor, ranges))


def test_float16_equals_pytorch(bundle, library):
    assert check_cli.main([str(bundle.folder), "--backend", library]) == 0


@pytest.mark.parametrize(("policy", "method"), [("aircache", "fastv"), ("snapkv", "zipvl"), ("elastic", "none")])
@pytest.mark.parametrize("backend", ["ort-cuda", "tensorrt", "tensorrt-rtx"])
def test_caches_that_are_cut_equal_pytorch(backend, policy, method, export_tiny):
    started(backend)
    engine = "none" if backend == "ort-cuda" else backend
    fields = {"dtype": "float16", "engine": engine, "cache": load_policy(policy)(), "cache_share": 0.4}
    folder = export_tiny(f"gpu-cut-{backend}", method=method, **fields)
    assert check_cli.main([str(folder), "--backend", backend]) == 0


@pytest.mark.parametrize(("family", "method"), combinations("ONNX Runtime CUDA"))
@pytest.mark.parametrize(
    ("backend", "name"), [("ort-cuda", "ONNX Runtime CUDA"), ("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX")]
)
def test_every_family_equals_pytorch(backend, name, family, method, export_tiny, proves):
    started(backend)
    engine = "none" if backend == "ort-cuda" else backend
    fields = {"dtype": "float16", "engine": engine, "images": 2, **FIELDS.get(method, {})}
    folder = export_tiny(f"gpu-{backend}", family=family, method=method, **fields)
    assert check_cli.main([str(folder), "--backend", backend, "--tokens", "8"]) == 0
    proves(family, method, name)


def test_a_chain_equals_ort_cpu(chained, library):
    assert check_cli.main([str(chained.folder), "--backend", library, "--against", "ort-cpu"]) == 0


@pytest.mark.parametrize("weights", sorted({*format_names()} - {*WITHOUT_ENGINES}))
def test_packed_weights_equal_pytorch(library, weights, export_tiny):
    """Every format on the device, towers too; nvfp4 where it has kernels for it."""
    fields = {"weights": weights, "vision_weights": weights, "dtype": "float16", "engine": library}
    folder = export_tiny(f"gpu-{weights}-{library}", k=2, r=0.5, **fields)
    assert check_cli.main([str(folder), "--backend", library, "--tokens", "8"]) == 0


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_onnxruntime_cuda_runs_packed_weights(weights, export_tiny):
    started("ort-cuda")
    folder = export_tiny(f"gpu-ort-{weights}", k=2, r=0.5, dtype="float16", weights=weights)
    assert check_cli.main([str(folder), "--backend", "ort-cuda", "--tokens", "8"]) == 0


def test_bfloat16_equals_pytorch(library, export_tiny):
    folder = export_tiny(f"gpu-bfloat16-{library}", k=2, r=0.5, dtype="bfloat16", engine=library)
    assert check_cli.main([str(folder), "--backend", library]) == 0


def test_float32_equals_pytorch_without_tf32(library, export_tiny):
    folder = export_tiny(f"gpu-float32-{library}", k=2, r=0.5, engine=library)
    assert check_cli.main([str(folder), "--backend", library]) == 0


@pytest.mark.parametrize("how", ["auto", "capture"])
def test_cuda_graphs_change_nothing(chained, library, picture, how, capsys):
    plain = answers(runtime.Session(chained, started(library, "off"), batch=2), picture)
    capsys.readouterr()
    replayed = answers(runtime.Session(chained, started(library, how), batch=2), picture)
    said = capsys.readouterr().err
    assert replayed[0] == plain[0]
    np.testing.assert_allclose(replayed[1], plain[1], atol=2e-2)
    if "no CUDA graphs" in said:
        pytest.skip(said)


def test_graphs_follow_the_window_through_its_buckets(bundle, library):
    """150 steps cross a bucket; each step once as a graph of its own window, once plainly."""
    sessions = [runtime.Session(bundle, started(library, how)) for how in ("capture", "off")]
    for session in sessions:
        session.prefill([list(range(1, 61))])
    for step in range(150):
        found, wanted = (session.decode(np.array([60 + step % 100])) for session in sessions)
        np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), atol=2e-2, err_msg=str(step))


def test_caches_take_what_the_contract_predicts(bundle, library, picture):
    session = runtime.Session(bundle, started(library), batch=2)
    predicted = sum(group.nbytes(2, bundle.contract.dtype) for group in bundle.contract.groups)
    assert session.backend.memory()["caches"] == predicted
    addresses = {name: cache.address for name, cache in session.caches.items()}
    answers(session, picture)
    memory = session.backend.memory()
    assert memory["caches"] == predicted and memory["activations"] > 0 and memory["engines"] > 0
    assert addresses == {name: cache.address for name, cache in session.caches.items()}


def test_the_second_start_finds_the_compiled_kernels(bundle, library, picture, tmp_path):
    if not hasattr(engines.import_library(library), "IRuntimeCache"):
        pytest.skip(f"{library} compiles nothing on the target")
    kept = tmp_path / "cache" / "vlmtrim" / "tensorrt-rtx"
    seconds = []
    for _ in range(2):
        backend = started(library)
        start = backend.mark()
        session = runtime.Session(bundle, backend)
        answers(session, picture, tokens=3)
        seconds.append(backend.elapsed(start, backend.mark()))
        del session
        gc.collect()
        assert {path.name.split("-")[0] for path in kept.iterdir()} == {"vision", "embed", "decoder"}
    print(f"first start {seconds[0]:.2f} s, second {seconds[1]:.2f} s")


def test_events_measure_the_device(bundle, library, picture):
    session = runtime.Session(bundle, started(library))
    answers(session, picture, tokens=3)
    start = session.backend.mark()
    session.decode(np.array([65]))
    end = session.backend.mark()
    assert 0 < session.backend.elapsed(start, end) < 10
    assert session.times.vision > 0 and session.times.prefill > 0
