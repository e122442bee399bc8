"""ONNX Runtime's CUDA provider in C++, on a stand-in whose GPU memory the host cannot touch: the calls, not a GPU."""

import ctypes

import pytest
from probing import Native, ProbeError, build_folder
from test_caching import exported, two_turns
from test_session import CASES, three_turns

from vlmtrim.graphs.bundle import open_bundle


class Provider:
    def __init__(self, monkeypatch):
        path = build_folder() / "stand_in_onnxruntime/libstand_in_onnxruntime.so"
        monkeypatch.setenv("VLMTRIM_ONNXRUNTIME", str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.stand_in_mistake.restype = ctypes.c_char_p
        self._library.stand_in_count.restype = ctypes.c_int64
        self.begin()

    def begin(self, opens=1):
        self._library.stand_in_begin(opens)

    def count(self, what):
        return self._library.stand_in_count(what.encode())

    @property
    def mistake(self):
        return self._library.stand_in_mistake().decode()


@pytest.fixture
def provider(monkeypatch):
    made = Provider(monkeypatch)
    yield made
    assert made.mistake == "" and made.count("blocks") == 0


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["fastv", "zipvl", "trimmed", *slow("half", "qwen2_5")])
def test_three_turns_to_the_bit(name, export_tiny, provider):
    family, fields = CASES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    native = Native(folder, backend="ort-cuda")
    three_turns(folder, native)
    assert provider.count("sessions") >= 4
    native.close()


@pytest.mark.parametrize("policy", ["snapkv", *slow("keyformer")])
def test_caches_are_cut_where_they_are(policy, export_tiny, provider):
    bundle = open_bundle(exported(export_tiny, policy))
    native = Native(bundle.folder, backend="ort-cuda")
    two_turns(bundle, native)
    native.close()


def test_steps_leave_nothing_behind(fastv_bundle, provider):
    """The caches' blocks and what the last step returned; logits alone come down."""
    native = Native(fastv_bundle, backend="ort-cuda")
    layers = sum(len(group.layers) for group in open_bundle(fastv_bundle).contract.groups)
    assert provider.count("blocks") == 2 * layers
    native.prefill([3, 4, 5])
    native.decode(7)
    blocks, runs = provider.count("blocks"), provider.count("runs")
    for token in range(5):
        native.decode(20 + token)
    assert provider.count("blocks") == blocks > 0
    assert provider.count("runs") == runs + 3 * 5  # embedding, decoder, and the copy of logits
    native.close()


def test_a_library_without_the_provider_says_what_it_has(fastv_bundle):
    said = r"needs ONNX Runtime's CUDAExecutionProvider, the library here has .*CPU.*; set VLMTRIM_ONNXRUNTIME"
    with pytest.raises(ProbeError, match=said):
        Native(fastv_bundle, backend="ort-cuda")


def test_a_provider_that_does_not_start_says_why(fastv_bundle, provider):
    provider.begin(opens=0)
    said = "does not start; check the NVIDIA driver, and that CUDA and cuDNN .*: Failed to load library"
    with pytest.raises(ProbeError, match=said):
        Native(fastv_bundle, backend="ort-cuda")
    native = Native(fastv_bundle, backend="auto")
    native.prefill([3, 4, 5])
    assert provider.count("blocks") == 0
    native.close()
    provider.begin()
    native = Native(fastv_bundle, backend="auto")
    native.prefill([3, 4, 5])
    assert provider.count("blocks") > 0
    native.close()
