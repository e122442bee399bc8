"""One GPU through cuda-python: memory, one stream, events, CUDA graphs. Neither torch nor pycuda.

Everything is queued on one stream, in order. The host waits in :meth:`Device.wait` only; what a queued copy reads or
writes on the host must stay as it is until then.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtrim.runtime import dtypes
from vlmtrim.runtime.errors import RuntimeRefusal

ALIGNMENT = 256  # bytes; TensorRT asks it of every address
SMALL = 1 << 20  # bytes up to which results come down through page-locked memory


def import_runtime() -> Any:
    """cuda-python's runtime API. Raises RuntimeRefusal naming the package where it is missing."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ModuleNotFoundError as error:
        raise RuntimeRefusal("cuda-python is not installed; pip install cuda-bindings") from error
    except (ImportError, OSError) as error:
        raise RuntimeRefusal(f"cuda-python is installed but does not load: {error}") from error


class CudaError(RuntimeRefusal):
    """A CUDA call failed; ``code`` is its cudaError_t."""

    def __init__(self, message: str, code: Any):
        super().__init__(message)
        self.code = code


class Device:
    """The first GPU that is visible, and a stream on it.

    Attributes:
        name, capability: what the GPU is; (major, minor) of its compute capability.
        waits: how often the host waited, so that users of host memory know whether their copies are done.
        used: bytes allocated on the device, by use.

    Raises:
        RuntimeRefusal: cuda-python, the driver or a GPU is missing.
    """

    def __init__(self) -> None:
        self._cuda = import_runtime()
        self._find_gpu()
        self.call("cudaSetDevice", 0)
        properties = self.call("cudaGetDeviceProperties", 0)
        name = properties.name
        self.name = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
        self.capability = (int(properties.major), int(properties.minor))
        self.stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.waits = 0
        self.used: Counter[str] = Counter()
        self._small: Pinned | None = None

    def _find_gpu(self) -> None:
        cuda = self._cuda
        error, count = cuda.cudaGetDeviceCount()
        codes = cuda.cudaError_t
        if error == codes.cudaErrorInsufficientDriver:
            installed, needed = self.call("cudaDriverGetVersion"), self.call("cudaRuntimeGetVersion")
            if not installed:
                raise RuntimeRefusal("no NVIDIA driver is loaded here; install one until nvidia-smi lists the GPU")
            raise RuntimeRefusal(
                f"the NVIDIA driver supports CUDA {_version(installed)}, cuda-bindings is made for "
                f"{_version(needed)}: update the driver, or install cuda-bindings<{needed // 1000}"
            )
        if error == codes.cudaErrorNoDevice or (error == codes.cudaSuccess and not count):
            raise RuntimeRefusal(
                "the NVIDIA driver finds no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a container, --gpus all"
            )
        if error != codes.cudaSuccess:
            raise RuntimeRefusal(f"CUDA does not start here: {self._say(error)}")

    def call(self, function: str, *args: Any) -> Any:
        """A call of the runtime API; its results without the error code. Raises CudaError."""
        error, *results = getattr(self._cuda, function)(*args)
        if error == self._cuda.cudaError_t.cudaSuccess:
            return results[0] if len(results) == 1 else tuple(results) or None
        raise CudaError(f"{function} failed: {self._say(error)}", error)

    def _say(self, error: Any) -> str:
        name, text = (getattr(self._cuda, f)(error)[1] for f in ("cudaGetErrorName", "cudaGetErrorString"))
        return " - ".join(part.decode() if isinstance(part, bytes) else str(part) for part in (name, text))

    def allocate(self, nbytes: int, use: str) -> Memory:
        """Memory on the device, counted under a use. Raises RuntimeRefusal where it does not fit."""
        try:
            return Memory(self, nbytes, use)
        except CudaError as error:
            if error.code != self._cuda.cudaError_t.cudaErrorMemoryAllocation:
                raise
            free, total = self.call("cudaMemGetInfo")
            raise RuntimeRefusal(
                f"{self.name} has {free / 1e9:.2f} of {total / 1e9:.2f} GB free, {nbytes / 1e9:.2f} GB more are needed "
                f"for {use}; export with a smaller --max-seq-len or --max-batch, or end what else uses the GPU"
            ) from error

    def free_bytes(self) -> int:
        """Bytes that are free on the device."""
        return int(self.call("cudaMemGetInfo")[0])

    def zero(self, address: int, nbytes: int) -> None:
        """Queue zeros."""
        if nbytes:
            self.call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def copy_in(self, address: int, source: int, nbytes: int) -> None:
        """Queue a copy from host memory."""
        if nbytes:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self.call("cudaMemcpyAsync", address, source, nbytes, kind, self.stream)

    def copy_within(self, target: int, source: int, pitch: int, width: int, count: int) -> None:
        """Queue a copy on the device: ``count`` pieces of ``width`` bytes, each ``pitch`` bytes behind the last."""
        if width and count:
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            self.call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, count, kind, self.stream)

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """Copy from the device and wait; uint8 [nbytes]."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if not nbytes:
            return np.zeros(0, np.uint8)
        if nbytes > SMALL:
            data = np.empty(nbytes, np.uint8)
            self.call("cudaMemcpyAsync", data.ctypes.data, address, nbytes, kind, self.stream)
            self.wait()
            return data
        self._small = self._small or Pinned(self, SMALL)
        self.call("cudaMemcpyAsync", self._small.address, address, nbytes, kind, self.stream)
        self.wait()
        return self._small.data[:nbytes].copy()

    def wait(self) -> None:
        """Until all that is queued is done."""
        self.call("cudaStreamSynchronize", self.stream)
        self.waits += 1

    def mark(self) -> Event:
        """Record a point of the stream."""
        return Event(self)

    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds between two points, by the device's clock; waits for the second."""
        self.call("cudaEventSynchronize", end.handle)
        return float(self.call("cudaEventElapsedTime", start.handle, end.handle)) / 1e3

    def capture(self, launch: Callable[[], bool]) -> CapturedGraph:
        """What ``launch`` queues, as a graph; nothing of it runs. Raises CudaError where it cannot be captured."""
        cuda = self._cuda
        # Thread-local: a memory call of another thread must not spoil the capture.
        self.call("cudaStreamBeginCapture", self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            launched = launch()
        finally:
            error, graph = cuda.cudaStreamEndCapture(self.stream)
        if error != cuda.cudaError_t.cudaSuccess:
            raise CudaError(f"the capture failed: {self._say(error)}", error)
        try:
            if not launched:
                raise CudaError("the library does not launch while a stream is captured", error)
            return CapturedGraph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)


class Memory:
    """An allocation on the device, freed with the last reference to it."""

    def __init__(self, device: Device, nbytes: int, use: str):
        self.nbytes = nbytes
        self.address = int(device.call("cudaMalloc", max(nbytes, ALIGNMENT)))
        device.used[use] += nbytes
        weakref.finalize(self, _free, device, self.address, nbytes, use).atexit = False


def _free(device: Device, address: int, nbytes: int, use: str) -> None:
    device.used[use] -= nbytes
    device.call("cudaFree", address)


class Pinned:
    """Page-locked host memory, which copies may read and write while the host goes on."""

    def __init__(self, device: Device, nbytes: int):
        self.address = int(device.call("cudaHostAlloc", nbytes, 0))
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        weakref.finalize(self, device.call, "cudaFreeHost", self.address).atexit = False


class Event:
    """A point of the device's stream."""

    def __init__(self, device: Device):
        self.handle = device.call("cudaEventCreateWithFlags", 0)
        weakref.finalize(self, device.call, "cudaEventDestroy", self.handle).atexit = False
        device.call("cudaEventRecord", self.handle, device.stream)


class CapturedGraph:
    """Launches, captured once: the same kernels on the same addresses."""

    def __init__(self, device: Device, handle: Any):
        self._device, self._handle = device, handle
        weakref.finalize(self, device.call, "cudaGraphExecDestroy", handle).atexit = False

    def launch(self) -> None:
        """Queue the graph."""
        self._device.call("cudaGraphLaunch", self._handle, self._device.stream)


@dataclass(frozen=True)
class DeviceTensor:
    """A view of device memory; ``owner`` keeps that memory alive."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the view."""
        return dtypes.nbytes(self.shape, self.dtype)


class Slot:
    """Device memory for one tensor of a graph: reused by every step, replaced by a larger one where it is too small.

    It grows at least twofold and never beyond ``limit``, so that decoding does not allocate. What was in it is lost.
    """

    def __init__(self, device: Device, use: str, limit: int | None = None):
        self._device, self._use, self._limit = device, use, limit
        self._memory: Memory | None = None
        self._pinned: Pinned | None = None
        self._held = -1  # bytes of the last array that was loaded
        self._loaded_at = -1

    @property
    def memory(self) -> Memory:
        """The memory as it is now."""
        assert self._memory is not None
        return self._memory

    def fit(self, nbytes: int) -> int:
        """Address of at least ``nbytes`` bytes, never null."""
        if self._memory is None or self._memory.nbytes < nbytes:
            size = nbytes if self._memory is None else max(nbytes, 2 * self._memory.nbytes)
            size = -(-max(size, ALIGNMENT) // ALIGNMENT) * ALIGNMENT
            if self._limit is not None:
                size = max(nbytes, min(size, self._limit))
            if self._memory is not None:
                self._device.wait()  # a queued step may still use what is freed here
                self._memory = None
            self._memory = self._device.allocate(size, self._use)
        return self._memory.address

    def load(self, array: dtypes.HostArray) -> int:
        """Queue a copy of an array into the slot unless it holds the same bytes; returns the address."""
        data = dtypes.raw(array)
        address = self.fit(data.size)
        if self._pinned is None or self._pinned.data.size < data.size:
            self._device.wait()
            self._pinned = Pinned(self._device, self.memory.nbytes)
        staged = self._pinned.data[: data.size]
        if data.size == self._held and np.array_equal(staged, data):
            return address
        if self._loaded_at == self._device.waits:  # the copy of the last array may still read the staging memory
            self._device.wait()
        staged[:] = data
        self._device.copy_in(address, self._pinned.address, data.size)
        self._held, self._loaded_at = data.size, self._device.waits
        return address


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
