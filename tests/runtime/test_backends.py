"""Which backend is taken, what is missing where one cannot start, and the calls that the fakes stand for."""

import dataclasses
import importlib
import inspect
import re

import fake_cuda
import fake_tensorrt
import ml_dtypes
import numpy as np
import pytest
from fake_machine import Machine

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.backends import cuda, ort, tensorrt
from vlmtrim.runtime.engines import build as engines
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.select_backend import BACKENDS, choose_backend, make_backend

CODES = fake_cuda.real.cudaError_t


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "home")


def test_auto_takes_tensorrt_where_its_engines_are(machine, fastv_bundle, tmp_path, capsys):
    bundle = open_bundle(machine.with_engines(fastv_bundle, tmp_path / "bundle"))
    capsys.readouterr()
    assert choose_backend("auto", bundle, verbose=True).name == "tensorrt"
    assert capsys.readouterr().err == "backend tensorrt\n"


def test_auto_takes_tensorrt_rtx_where_the_engines_are_its_own(monkeypatch, fastv_bundle, tmp_path, capsys):
    machine = Machine(monkeypatch, tmp_path / "home", rtx=True)
    bundle = open_bundle(machine.with_engines(fastv_bundle, tmp_path / "bundle"))
    capsys.readouterr()
    assert choose_backend("auto", bundle, verbose=True).name == "tensorrt-rtx"
    assert capsys.readouterr().err == (
        "backend tensorrt-rtx; not tensorrt: vision.engine is made for tensorrt-rtx 10.15.1, this is tensorrt 10.15.1\n"
    )


def test_auto_says_why_every_faster_backend_is_passed_over(machine, fastv_bundle, capsys):
    assert choose_backend("auto", open_bundle(fastv_bundle), verbose=True).name == "ort-cpu"
    said = capsys.readouterr().err
    assert said.startswith("backend ort-cpu; not tensorrt: the bundle has no engines; not tensorrt-rtx: ")
    assert "not ort-cuda: backend ort-cuda needs ONNX Runtime's CUDAExecutionProvider" in said and said.count("\n") == 1


def test_auto_refuses_where_nothing_runs_the_bundle(fastv_bundle, monkeypatch):
    bundle = open_bundle(fastv_bundle)
    bundle = dataclasses.replace(bundle, contract=dataclasses.replace(bundle.contract, dtype="bfloat16"))
    monkeypatch.setattr(ort, "_PROVIDERS", {**ort._PROVIDERS, "ort-cuda": "NoProvider"})
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if "tensorrt" in name else object())
    with pytest.raises(RuntimeRefusal, match=r"no backend can run .*tensorrt: tensorrt is not installed; .*bfloat16"):
        choose_backend("auto", bundle)
    with pytest.raises(RuntimeRefusal, match="no bfloat16 kernels on the CPU"):
        runtime.Session(bundle, make_backend("ort-cpu"))


def test_an_unknown_backend_lists_those_there_are():
    with pytest.raises(
        RuntimeRefusal, match=r"'gpu' is not supported; supported: auto, tensorrt, tensorrt-rtx, ort-cuda"
    ):
        make_backend("gpu")
    assert BACKENDS == ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")


@pytest.mark.parametrize(
    ("count", "driver", "says"),
    [
        ((CODES.cudaErrorInsufficientDriver, None), 0, "no NVIDIA driver is loaded here; install one"),
        (
            (CODES.cudaErrorInsufficientDriver, None),
            12040,
            r"driver supports CUDA 12\.4, cuda-bindings is made for 13\.5",
        ),
        ((CODES.cudaErrorNoDevice, None), 13000, "the NVIDIA driver finds no GPU"),
        ((CODES.cudaSuccess, 0), 13000, "the NVIDIA driver finds no GPU"),
        ((CODES.cudaErrorUnknown, None), 13000, "CUDA does not start here: cudaErrorUnknown"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(machine, count, driver, says):
    machine.cuda.cudaGetDeviceCount = lambda: count
    machine.cuda.cudaDriverGetVersion = lambda: (CODES.cudaSuccess, driver)
    with pytest.raises(RuntimeRefusal, match=says) as caught:
        make_backend("tensorrt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'cuda'"), "cuda-python is not installed; pip install"),
        (ImportError("libcudart: wrong version"), "installed but does not load: libcudart"),
    ],
)
def test_cuda_python_that_is_missing_or_broken_is_named(monkeypatch, error, says):
    def fail(name):
        raise error

    monkeypatch.setattr(cuda.importlib, "import_module", fail)
    with pytest.raises(RuntimeRefusal, match=says):
        cuda.import_runtime()


def test_without_a_gpu_the_real_library_is_refused_with_the_reason():
    """cuda-python loads without a driver; so does TensorRT-RTX. Neither must end in a stack trace."""
    if importlib.import_module("cuda.bindings.runtime").cudaGetDeviceCount()[0] == CODES.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeRefusal, match=r"NVIDIA driver"):
        make_backend("tensorrt-rtx")


def test_unknown_ways_to_replay_are_refused(machine):
    with pytest.raises(RuntimeRefusal, match="give one of auto, capture, off"):
        tensorrt.TrtBackend("tensorrt", "yes")


def parameters(function):
    """Names of a compiled function's parameters, from the first line of its text: ``f(size_t count, kind: Kind)``."""
    stated = function.__doc__.splitlines()[0].partition("(")[2].rstrip(")")
    return [part.partition(":")[0].split()[-1] for part in stated.split(", ") if part]


def test_every_cuda_function_is_called_as_cuda_python_has_it():
    """The backend runs on FakeCuda, which takes what cuda-python takes under the same names."""
    faked = [name for name in vars(fake_cuda.FakeCuda) if name.startswith("cuda")]
    assert len(faked) > 20
    for name in faked:
        function = getattr(fake_cuda.real, name)
        assert list(inspect.signature(getattr(fake_cuda.FakeCuda, name)).parameters)[1:] == parameters(function), name
    for constant in ("cudaStreamNonBlocking", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert hasattr(fake_cuda.real, constant)


CLASSES = ("Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext")


@pytest.mark.parametrize("name", CLASSES)
def test_every_call_of_the_library_is_one_that_it_has(name):
    """What the fakes of one class and its TensorRT-RTX variant offer is what the real class offers, with its names."""
    real = getattr(engines.import_library("tensorrt-rtx"), name)
    fakes = [fake for key, fake in vars(fake_tensorrt).items() if key in (name, name.replace("I", "Rtx", 1))]
    offered = {key: value for fake in fakes for key, value in vars(fake).items() if not key.startswith("_")}
    assert offered
    for key, value in offered.items():
        if key in ("library", "strategy", "cache", "kernels"):
            continue
        assert hasattr(real, key), f"{name} has no {key}"
        if inspect.isfunction(value):
            known = real_signatures(getattr(real, key))
            assert any(list(inspect.signature(value).parameters)[1:] == names for names in known), (key, known)
        else:
            assert isinstance(getattr(real, key), property)


def real_signatures(method):
    """Parameter names of every overload, without self and without defaults' values."""
    found = []
    for line in method.__doc__.splitlines():
        match = re.match(rf"(?:\d+\. )?{method.__name__}\(self: [\w.]+(?:, (.*))?\) -> ", line.strip())
        if match:
            found.append(re.findall(r"(\w+): ", re.sub(r"\[[^\]]*\]|= <[^>]*>", "", match[1] or "")))
    return found


def test_names_of_the_library_that_are_no_calls_exist():
    trt = engines.import_library("tensorrt-rtx")
    for path in (
        "TensorLocation.DEVICE",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "BuilderFlag.TF32",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    ):
        value = trt
        for part in path.split("."):
            value = getattr(value, part)


def test_bfloat16_is_rounded_as_ml_dtypes_rounds():
    values = np.random.default_rng(3).normal(0, 50, 4096).astype(np.float32)
    values[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.00390625, 1.01171875, 3e38]  # two ties among them
    cast = dtypes.cast(values.reshape(64, 64), "bfloat16")
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(dtypes.from_raw(dtypes.raw(cast), (4096,), "bfloat16"), expected.astype(np.float32))
    assert dtypes.describe(cast) == ((64, 64), "bfloat16") and dtypes.raw(cast).size == 8192
    assert not dtypes.raw(dtypes.zeros((2, 0, 3), "bfloat16")).size
    np.testing.assert_array_equal(dtypes.cast(values[8:], "float16"), values[8:].astype(np.float16))


def test_onnx_runtime_takes_bfloat16_and_views():
    backend = make_backend("ort-cpu")
    values = np.arange(-3, 3, dtype=np.float32)
    value = ort.on_host(backend._ort, dtypes.cast(values, "bfloat16"))
    assert ort.dtype_of(value) == "bfloat16"
    view = backend.reshape(value, (2, 3))
    assert (view.shape, view.dtype, view.owner.data_ptr()) == ((2, 3), "bfloat16", value.data_ptr())
    np.testing.assert_array_equal(backend.to_host(view), values.reshape(2, 3))
    assert backend.to_host(backend.zeros((2, 0, 3), "bfloat16")).shape == (2, 0, 3)
    again = backend.reshape(backend.reshape(backend.zeros((4, 3), "float32"), (12,)), (2, 6))
    assert backend.to_host(again).shape == (2, 6) and again.dtype == "float32"


def test_float32_stays_float32_on_cuda():
    """TF32, the provider's default, would fail the float32 tolerances of check-vlm."""
    assert ort._OPTIONS["ort-cuda"] == {"use_tf32": "0"}


class Grown:
    """A slot on a fake device, with the history of its addresses."""

    def __init__(self, machine, limit=None):
        self.device = cuda.Device()
        self.slot = cuda.Slot(self.device, "io", limit)


def test_slots_grow_twofold_up_to_their_limit(machine):
    grown = Grown(machine, limit=3000)
    sizes = []
    for needed in (100, 200, 300, 600, 1500, 2999, 10):
        assert grown.slot.fit(needed) % cuda.ALIGNMENT == 0
        sizes.append(grown.slot.memory.nbytes)
    assert sizes == [256, 256, 512, 1024, 2048, 3000, 3000] and grown.device.used["io"] == 3000


def test_what_did_not_change_is_not_copied_again_and_staging_is_not_overwritten_early(machine):
    grown = Grown(machine)
    first, second = np.arange(8), np.arange(8) + 1
    address = grown.slot.load(first)
    grown.slot.load(first)
    assert machine.cuda.count["copies in"] == 1
    waits = grown.device.waits
    grown.slot.load(second)  # the first copy has not run yet: its source must not change
    assert grown.device.waits == waits + 1
    np.testing.assert_array_equal(grown.device.read(address, 64).view(np.int64), second)
    grown.slot.load(first)
    assert grown.device.waits == waits + 2  # the read was the only other wait
    large = np.random.default_rng(0).integers(0, 255, cuda.SMALL + 100).astype(np.uint8)
    np.testing.assert_array_equal(grown.device.read(grown.slot.load(large), large.size), large)


def test_the_fake_gpu_notices_what_a_real_one_would_not_forgive(machine):
    device = cuda.Device()
    memory = device.allocate(256, "io")
    with pytest.raises(AssertionError, match="outside of every allocation"):
        device.read(memory.address + 8, 256)
    address = memory.address
    del memory
    with pytest.raises(AssertionError, match="outside of every allocation"):
        device.read(address, 256)
    block = next(iter(machine.cuda.host.values()), None) or fake_cuda.Block(64)
    fake_cuda.ctypes.memset(block.address + block.nbytes, 0, 1)
    with pytest.raises(AssertionError, match="beyond an allocation"):
        block.check()
