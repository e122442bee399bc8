"""The TensorRT backend on a fake CUDA and a fake TensorRT that run the bundle's own ONNX files: against ort-cpu."""

import shutil

import fake_cuda
import fake_tensorrt
import numpy as np
import pytest

from vlmtrim import runtime
from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import engines, profiles
from vlmtrim.runtime.backends import cuda, tensorrt
from vlmtrim.runtime.select_backend import make_backend


class Machine:
    """A fake machine with a GPU, cuda-python and one TensorRT library."""

    def __init__(self, monkeypatch, home, rtx=False):
        self.cuda = fake_cuda.FakeCuda()
        self.trt = fake_tensorrt.make_library(self.cuda, rtx)
        self.library = "tensorrt-rtx" if rtx else "tensorrt"
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.setattr(cuda, "import_runtime", lambda: self.cuda)
        for module in (engines, tensorrt):
            monkeypatch.setattr(module, "find_library", lambda name: name)
            monkeypatch.setattr(module, "import_library", lambda name: self.trt)
        monkeypatch.setattr(engines, "_build", fake_tensorrt.build)

    def with_engines(self, folder, target):
        """A copy of a bundle with engines of this machine."""
        shutil.copytree(folder, target)
        engines.rebuild(target, self.library)
        return target


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "home")


@pytest.fixture
def rtx_machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "home", rtx=True)


@pytest.fixture(scope="module")
def chained_bundle(export_tiny):
    return export_tiny("chained", k=2, r=0.5, engine="tensorrt-rtx", engine_shards=2, max_batch=2)


def conversation(backend, folder, picture, batch=1):
    """Two turns with pictures and one without, rows of different length; then all that was computed."""
    chat = runtime.Chat(runtime.Session(open_bundle(folder), backend, batch))
    long, short = "How many things are there in this picture, and which of them is the largest?", "What is it?"
    steps = []

    def ask(questions, images, tokens):
        if batch == 1:
            return list(chat.generate(questions[0], images[0] if images else [], max_new_tokens=tokens))
        return list(chat.generate(questions, images, max_new_tokens=tokens))

    pictures = [[picture], [picture]]
    for questions, images, tokens in (
        ([long, short], pictures, 12),
        ([short, long], pictures, 6),
        ([short, short], [], 3),
    ):
        steps += ask(questions, images, tokens)
    caches = [array for row in range(batch) for pair in chat.session.cache_contents(row) for array in pair]
    prefills = [step.prefill for step in steps if step.index == 0]
    kept = [row for prefill in prefills for row in prefill.kept_indices or []]
    numbers = [array for prefill in prefills for array in (prefill.logits, prefill.visual_scores) if array is not None]
    return [step.token_ids for step in steps], kept, [*numbers, *caches]


def assert_equal(found, expected, tolerance=0.0):
    assert found[0] == expected[0]
    for have, want in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(have, want)
    for have, want in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(have, want, atol=tolerance, rtol=0)


def ort_cpu(window=None):
    """ONNX Runtime on the CPU, with live windows in buckets as TensorRT gets them unless others are asked for."""
    backend = make_backend("ort-cpu")
    backend.window = window or profiles.bucket
    return backend


@pytest.mark.parametrize("cuda_graphs", ["auto", "off"])
@pytest.mark.parametrize(("bundle", "batch"), [("fastv_bundle", 1), ("chained_bundle", 2), ("dense_bundle", 1)])
def test_a_conversation_equals_ort_cpu_to_the_bit(request, machine, tmp_path, picture, bundle, batch, cuda_graphs):
    folder = machine.with_engines(request.getfixturevalue(bundle), tmp_path / "bundle")
    found = conversation(tensorrt.TrtBackend("tensorrt", cuda_graphs), folder, picture, batch)
    assert_equal(found, conversation(ort_cpu(), folder, picture, batch))
    assert (machine.cuda.count["replays"] > 20) == (cuda_graphs == "auto")


def test_longer_live_windows_change_nothing(fastv_bundle, picture):
    """Buckets give attention keys that no query may see; rows of different length, both groups, to the capacity."""
    expected = conversation(ort_cpu(lambda length, capacity: length), fastv_bundle, picture, batch=2)
    for window in (profiles.bucket, lambda length, capacity: capacity):
        assert_equal(conversation(ort_cpu(window), fastv_bundle, picture, batch=2), expected, tolerance=1e-5)
