"""ONNX Runtime on CPU and CUDA. Caches are updated in place: input and output are one OrtValue through IOBinding."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import ROUNDING, TOWER, Contract, GraphSpec
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.backends import fusing, handmade
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Opened, Tensor, check_boundary
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.measure.machine import free_memory

# MatMulNBits' accuracy_level: activations rounded to 8 bits, as the fast kernels do, or as they are.
_LEVELS = {"int8": "4", "float32": "1"}
FREE_SHARE = 0.9  # of the free memory that a decoder may fill
_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
# float32 stays float32 on CUDA: TF32, the provider's default, keeps 10 bits of it.
_OPTIONS = {"ort-cpu": {}, "ort-cuda": {"use_tf32": "0"}}
# ONNX's numbers of the dtypes, onnx.TensorProto.DataType.
_ELEMENTS = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}
_DTYPES = {number: name for name, number in _ELEMENTS.items()}
# Its own names of them, where they are not ours.
_TYPES = {f"tensor({name})": name for name in _ELEMENTS} | {"tensor(float)": "float32"}


def _import() -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeRefusal(
            "ONNX Runtime is not installed; install vlmtrim[cpu] (onnxruntime) or vlmtrim[cuda] (onnxruntime-gpu)"
        )
    import onnxruntime

    return onnxruntime


def _resident_bytes(folder: Path, contract: Contract) -> int:
    """What the CPU provider keeps in memory: weights transposed or packed anew, float16 ones as float32."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    packed = sum(kind.nbytes for kind in contract.packed)
    return packed + max(0, weights - packed) * (2 if contract.dtype == "float16" else 1)


@dataclass(frozen=True)
class View:
    """A part of an OrtValue's memory, ``offset`` bytes behind its start, under a shape of its own; ONNX Runtime has no
    value for that, so graphs bind it by its address."""

    owner: Any
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> str:
        """Dtype name."""
        return dtype_of(self.owner)

    @property
    def place(self) -> tuple[int, list[int], int]:
        """Element type, shape and address, as bindings take them."""
        return self.owner.element_type(), list(self.shape), self.owner.data_ptr() + self.offset


def _boundary(tensors: Sequence[Any]) -> dict[str, Opened]:
    """What a session says of its inputs or outputs, as the contract says it."""
    return {tensor.name: (_TYPES.get(tensor.type, str(tensor.type)), tensor.shape) for tensor in tensors}


def _first_line(error: Exception) -> str:
    """What went wrong, on one line; ONNX Runtime's messages may go on with whole nodes."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def dtype_of(value: Any) -> str:
    """Dtype name of an OrtValue."""
    return _DTYPES.get(value.element_type(), str(value.data_type()))


def on_host(ort: Any, array: dtypes.HostArray) -> Any:
    """An OrtValue over the memory of an array."""
    if isinstance(array, dtypes.BFloat16):
        bits = np.ascontiguousarray(array.bits)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ELEMENTS["bfloat16"])
    array = np.asarray(array, order="C")  # ascontiguousarray makes a scalar a vector
    return ort.OrtValue.ortvalue_from_numpy(array, "cpu", 0)


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
        if isinstance(tensor, View | dtypes.HostArray):
            return super()._describe(tensor)
        return tuple(tensor.shape()), dtype_of(tensor)

    def _run(self, feeds: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        for name, value in feeds.items():
            if isinstance(value, View):
                self._binding.bind_input(name, self._device, 0, *value.place)
                continue
            if isinstance(value, dtypes.HostArray):
                value = on_host(self._ort, value)  # ONNX Runtime copies it to where the graph reads it
            self._binding.bind_ortvalue_input(name, value)
        for name in self._free_outputs:  # bound anew: a kept binding would hold the last step's shape
            self._binding.bind_output(name, self._device, 0)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RuntimeRefusal(f"{self.spec.file}: ONNX Runtime cannot run it: {_first_line(error)}") from error
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
            outputs.append(present)
            if isinstance(value, View):
                self._binding.bind_input(past, self._device, 0, *value.place)
                self._binding.bind_output(present, self._device, 0, *value.place)
                continue
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._cache_outputs = tuple(outputs)
        self._free_outputs = [tensor.name for tensor in self.spec.outputs if tensor.name not in set(outputs)]


class OrtBackend(Backend):
    """ONNX Runtime with one execution provider.

    Marks are points on the host's clock, on CUDA too: ``run_with_iobinding`` returns when the device has finished.
    """

    def __init__(self, name: str, threads: int = 0, activations: str = "int8"):
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
        self._entries = {fusing.LEVEL: _LEVELS[activations]}
        self._unsigned: set[str] = set()  # files of graphs whose integers are multiplied unsigned
        self._needed = 0
        self._fused: set[tuple[str, int, str]] = set()  # forms of packed weights that were tried
        self._used: Counter[str] = Counter()
        self._copiers: dict[tuple[str, tuple[int, ...]], Any] = {}  # by dtype and shape

    def check(self, folder: Path, contract: Contract) -> None:
        """Raise RuntimeRefusal for a dtype that the device has no kernels for."""
        if self._device == "cpu" and contract.dtype == "bfloat16":
            raise RuntimeRefusal(
                "ONNX Runtime has no bfloat16 kernels on the CPU; export with --dtype float32, or use a GPU backend"
            )
        self._check_packed(contract)
        rounding = [kind for kind in contract.packed if kind.format in ROUNDING]
        if rounding and fusing.saturates(self._ort, self._provider, {}):
            self._unsigned |= {"vision.onnx" if kind.part == TOWER else "decoder.onnx" for kind in rounding}

    def open(self, folder: Path, contract: Contract, graph: str) -> Graph | Chain:
        """Open a graph of a bundle. Raises RuntimeRefusal where packed weights do not fit into memory."""
        self._needed = _resident_bytes(folder, contract)
        free = free_memory()
        if contract.packed and self._device == "cpu" and self._needed > FREE_SHARE * free:
            raise RuntimeRefusal(  # to read weights from the file at every step would unpack them at every step
                f"the bundle's weights take {self._needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; free "
                "some, or export with fewer bits (--weights int4, --vision-weights int8)"
            )
        return super().open(folder, contract, graph)

    def _check_packed(self, contract: Contract) -> None:
        """Raise RuntimeRefusal unless the library multiplies by every packed matrix as it is."""
        for kind in contract.packed:
            form = kind.format, kind.block, contract.dtype
            if form in self._fused or fusing.fuses(self._ort, self._provider, kind, contract.dtype, self._entries):
                self._fused.add(form)
                continue
            same = [k for k in contract.packed if k.format == kind.format]
            floats = f"turn {kind.matrices} matrices into {sum(k.weights for k in same) * 4 / 1e9:.2f} GB of floats"
            would = "multiply by them on the CPU" if kind.format in ROUNDING else floats
            raise RuntimeRefusal(
                f"{self.name} does not run {kind.format} weights: ONNX Runtime {self._ort.__version__} has no kernel "
                f"for them here and would {would} at every step; use a TensorRT backend, or export with --weights int4 "
                "or int8"
            )

    def _open(self, folder: Path, spec: GraphSpec, dims: Mapping[str, tuple[int, int]]) -> Graph:
        options = self._options(spec)
        try:
            session = self._ort.InferenceSession(
                folder / spec.file, options, providers=[(self._provider, _OPTIONS[self.name])]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise RuntimeRefusal(f"ONNX Runtime refuses {folder / spec.file}: {_first_line(error)}") from error
        if session.get_providers()[0] != self._provider:
            raise RuntimeRefusal(
                f"ONNX Runtime could not start {self._provider} and fell back to {session.get_providers()[0]}; "
                "check the NVIDIA driver and that CUDA and cuDNN match onnxruntime-gpu"
            )
        check_boundary(spec.file, spec.inputs, _boundary(session.get_inputs()), whole=True)
        check_boundary(spec.file, spec.outputs, _boundary(session.get_outputs()), whole=True)
        return OrtGraph(spec, dims, session, self._device)

    def _options(self, spec: GraphSpec) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what fails is said by the refusal
        for name, value in self._entries.items():
            options.add_session_config_entry(name, value)
        if spec.file in self._unsigned:
            options.add_session_config_entry(fusing.UNSIGNED, "1")
        if self._device == "cpu" and spec.file == "decoder.onnx":
            needed, free = self._needed, free_memory()
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
        value = on_host(self._ort, dtypes.zeros(shape, dtype))
        value = value if self._device == "cpu" else self._copied(value, self._device)
        size = dtypes.nbytes(shape, dtype)
        self._used["caches"] += size
        weakref.finalize(value, self._used.subtract, {"caches": size}).atexit = False
        return value

    def memory(self) -> dict[str, int]:
        """Bytes of the caches that are alive; ONNX Runtime does not say what its weights and activations take."""
        return dict(self._used)

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Copy of an OrtValue; ``numpy()`` alone may be a view of memory that the OrtValue frees."""
        view = _view(tensor)
        dtype, value = view.dtype, view.owner
        size = dtypes.nbytes(view.shape, dtype)
        if dtype != "bfloat16":
            data = value.numpy().reshape(-1).view(np.uint8)[view.offset : view.offset + size]
            return dtypes.from_raw(data.copy(), view.shape, dtype)
        value = value if self._device == "cpu" else self._copied(value, "cpu")
        data = ctypes.string_at(value.data_ptr() + view.offset, size) if size else b""
        return dtypes.from_raw(np.frombuffer(data, np.uint8), view.shape, dtype)

    def _copied(self, value: Any, device: str) -> Any:
        copy = self._ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device, 0)
        copy.update_inplace(value)
        return copy

    def reshape(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view of the same memory."""
        view = _view(tensor)
        if math.prod(view.shape) != math.prod(shape):
            raise RuntimeRefusal(f"{list(view.shape)} cannot be read as {list(shape)}")
        return View(view.owner, tuple(shape), view.offset)

    def rows(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """A view of the same memory."""
        view = _view(tensor)
        offset = view.offset + first * dtypes.nbytes(view.shape[1:], view.dtype)
        return View(view.owner, (count, *view.shape[1:]), offset)

    def copy_entries(self, source: Tensor, target: Tensor, entries: int) -> None:
        """Of the filled entries alone on the CPU; of the whole row, by a graph that copies, on a GPU."""
        if self._device == "cpu":
            _bytes(target)[:, :entries] = _bytes(source)[:, :entries]
            return
        key = source.dtype, tuple(source.shape)
        if key not in self._copiers:
            model, provider = handmade.identity(*key), (self._provider, _OPTIONS[self.name])
            self._copiers[key] = self._ort.InferenceSession(model, providers=[provider])
        binding = self._copiers[key].io_binding()
        binding.bind_input("x", self._device, 0, *source.place)
        binding.bind_output("y", self._device, 0, *target.place)
        self._copiers[key].run_with_iobinding(binding)


def _view(tensor: Any) -> View:
    return tensor if isinstance(tensor, View) else View(tensor, tuple(tensor.shape()))


def _bytes(row: View) -> np.ndarray:
    """Memory of a row of a cache on the host, uint8 [KV, C, bytes of an entry]."""
    _, heads, capacity, width = row.shape
    size = dtypes.nbytes((width,), row.dtype)
    data = (ctypes.c_uint8 * (heads * capacity * size)).from_address(row.owner.data_ptr() + row.offset)
    return np.ctypeslib.as_array(data).reshape(heads, capacity, size)
