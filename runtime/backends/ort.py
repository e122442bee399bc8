"""ONNX Runtime on CPU and CUDA. Caches are updated in place: input and output are one OrtValue through IOBinding."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.runtime.backends.base import Backend, Graph, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.machine import free_memory

FREE_SHARE = 0.9  # of the free memory that a decoder may fill
_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


def _import() -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeRefusal(
            "ONNX Runtime is not installed; install vlmtrim[cpu] (onnxruntime) or vlmtrim[cuda] (onnxruntime-gpu)"
        )
    import onnxruntime

    return onnxruntime


def _resident_bytes(folder: Path, spec: GraphSpec) -> int:
    """What the CPU provider keeps in memory for a graph: its weights transposed, float16 ones as float32."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return weights * (2 if any(tensor.dtype == "float16" for tensor in spec.inputs) else 1)


class OrtGraph(Graph):
    """An InferenceSession with one IOBinding that lives as long as the graph."""

    def __init__(self, spec: GraphSpec, dims: Mapping[str, tuple[int, int]], session: Any, device: str):
        super().__init__(spec, dims)
        self._ort = _import()
        self._session = session
        self._device = device
        self._binding = session.io_binding()
        self._free_outputs = [tensor.name for tensor in spec.outputs]

    def _describe(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        if isinstance(tensor, np.ndarray):
            return tensor.shape, tensor.dtype.name
        return tuple(tensor.shape()), str(_DTYPES.get(tensor.data_type(), tensor.data_type()))

    def _run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self._device, 0)
            self._binding.bind_ortvalue_input(name, value)
        for name in self._free_outputs:  # bound anew: a kept binding would hold the last step's shape
            self._binding.bind_output(name, self._device, 0)
        self._session.run_with_iobinding(self._binding)
        values = dict(zip(self._bound_order(), self._binding.get_outputs(), strict=True))
        return {name: values[name] for name in self._free_outputs}

    def _bound_order(self) -> list[str]:
        return [*self._cache_outputs, *self._free_outputs]

    _cache_outputs: tuple[str, ...] = ()

    def _bind_caches(self, caches: Mapping[str, Tensor]) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        outputs = []
        for past, value in caches.items():
            present = past.replace("past_key_values", "present")
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
            outputs.append(present)
        self._cache_outputs = tuple(outputs)
        self._free_outputs = [tensor.name for tensor in self.spec.outputs if tensor.name not in set(outputs)]


class OrtBackend(Backend):
    """ONNX Runtime with one execution provider.

    Marks are points on the host's clock, on CUDA too: ``run_with_iobinding`` returns when the device has finished.
    """

    def __init__(self, name: str, threads: int = 0):
        ort = _import()
        provider = _PROVIDERS[name]
        if provider not in ort.get_available_providers():
            raise RuntimeRefusal(
                f"backend {name} needs ONNX Runtime's {provider}, this installation has "
                f"{', '.join(ort.get_available_providers())}; pip uninstall onnxruntime, then install vlmtrim[cuda]"
            )
        self.name = name
        self._ort = ort
        self._provider = provider
        self._device = "cuda" if name == "ort-cuda" else "cpu"
        self._threads = threads
        self._used: Counter[str] = Counter()

    def _open(self, folder: Path, spec: GraphSpec, dims: Mapping[str, tuple[int, int]]) -> Graph:
        if self._device == "cpu" and any(tensor.dtype == "bfloat16" for tensor in spec.inputs):
            raise RuntimeRefusal(
                "ONNX Runtime has no bfloat16 kernels on the CPU; export with --dtype float32, or use a GPU backend"
            )
        options = self._options(folder, spec)
        try:
            session = self._ort.InferenceSession(folder / spec.file, options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RuntimeRefusal(f"ONNX Runtime refuses {folder / spec.file}: {error}") from error
        if session.get_providers()[0] != self._provider:
            raise RuntimeRefusal(
                f"ONNX Runtime could not start {self._provider} and fell back to {session.get_providers()[0]}; "
                "check the NVIDIA driver and that CUDA and cuDNN match onnxruntime-gpu"
            )
        return OrtGraph(spec, dims, session, self._device)

    def _options(self, folder: Path, spec: GraphSpec) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._device == "cpu" and spec.file == "decoder.onnx":
            needed, free = _resident_bytes(folder, spec), free_memory()
            if needed > FREE_SHARE * free:
                print(
                    f"{spec.file}: ONNX Runtime's copies of the weights would take {needed / 1e9:.1f} GB, "
                    f"{free / 1e9:.1f} GB are free: it reads them from the file at every step instead, which is slow",
                    file=sys.stderr,
                )
                # Each weight is converted where it is used and dropped after it, so nothing may be prepared ahead.
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
                options.enable_cpu_mem_arena = False
                options.enable_mem_pattern = False
        return options

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A zeroed OrtValue on the device."""
        value = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0)
        size = value.tensor_size_in_bytes()
        self._used["caches"] += size
        weakref.finalize(value, self._used.subtract, caches=size).atexit = False
        return value

    def memory(self) -> dict[str, int]:
        """Bytes of the caches that are alive; ONNX Runtime does not say what its weights and activations take."""
        return dict(self._used)

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Copy of an OrtValue; ``numpy()`` alone may be a view of memory that the OrtValue frees."""
        return np.array(tensor.numpy())

    def reshape(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """ONNX Runtime has no view of an OrtValue: on CUDA the features go through the host once per picture."""
        return self._ort.OrtValue.ortvalue_from_numpy(self.to_host(tensor).reshape(shape), self._device, 0)
