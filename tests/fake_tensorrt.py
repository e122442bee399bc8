"""TensorRT without a GPU: an engine is its ONNX file, run by ONNX Runtime on the bytes at the bound addresses.

Strict where the real library's documentation is: shapes must lie in the context's profile, every tensor needs an
aligned address in live device memory, a cache and its update must share one, scratch memory must be large enough, a
context must have run once with its shapes before it is captured, and a captured graph must not outlive them.
"""

from __future__ import annotations

import ctypes
import json
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np
import onnxruntime
from tensorrt_rtx_bindings import DataType, ExecutionContextAllocationStrategy, ILogger

from vlmtrim.runtime.engines import profiles as profile_rules

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}
DATA_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(float16)": DataType.HALF}
MAGIC = b"fake engine "


class Runtime:
    def __init__(self, logger):
        self._library, self._logger = logger.library, logger

    def deserialize_cuda_engine(self, serialized_engine):
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "not an engine")
            return None
        return ICudaEngine(self._library, json.loads(data[len(MAGIC) :]))


class ICudaEngine:
    def __init__(self, library, plan):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._library, self._profiles = library, plan["profiles"]
        self._session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self._tensors = {t.name: t for t in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._inputs = [t.name for t in self._session.get_inputs()]

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def get_tensor_name(self, index):
        return list(self._tensors)[index]

    def get_tensor_location(self, name):
        return self._library.TensorLocation.DEVICE

    def get_tensor_shape(self, name):
        return tuple(dim if isinstance(dim, int) else -1 for dim in self._tensors[name].shape)

    def get_tensor_dtype(self, name):
        return DATA_TYPES[self._tensors[name].type]

    def create_runtime_config(self):
        return (RtxRuntimeConfig if self._library.rtx else IRuntimeConfig)(self._library)

    def create_execution_context(self, runtime_config):
        assert runtime_config.strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        context = (RtxExecutionContext if self._library.rtx else IExecutionContext)(self, runtime_config)
        self._library.contexts.append(context)
        return context


class IRuntimeConfig:
    def __init__(self, library):
        self.library, self.strategy = library, None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class RtxRuntimeConfig(IRuntimeConfig):
    cuda_graph_strategy = "DISABLED"
    dynamic_shapes_kernel_specialization_strategy = "LAZY"
    cache = None

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class IRuntimeCache:
    """What it holds are the shapes that contexts ran with, in place of kernels."""

    def __init__(self):
        self.kernels = []

    def serialize(self):
        return b"kernels " + json.dumps(self.kernels).encode()

    def deserialize(self, blob):
        if not blob.startswith(b"kernels "):
            return False
        self.kernels = json.loads(blob[8:])
        return True


class IExecutionContext:
    def __init__(self, engine, config):
        self.engine, self.config = engine, config
        self._cuda = engine._library.cuda
        self._shapes, self._addresses, self._inferred = {}, {}, {}
        self._profile, self._scratch, self._settled = None, (0, 0), False
        self._generation = 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle
        self._profile = self.engine._profiles[profile_index]
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self._profile[name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        self._inferred, self._settled = {}, False
        self._generation += 1
        return True

    def infer_shapes(self):
        return [name for name in self.engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        if not self._inferred:
            zeros = {n: np.zeros(s, TYPES[self.engine._tensors[n].type]) for n, s in self._shapes.items()}
            outputs = self.engine._session.get_outputs()
            arrays = self.engine._session.run(None, zeros)
            self._inferred = {t.name: a.shape for t, a in zip(outputs, arrays, strict=True)}
        return self._inferred[name]

    def update_device_memory_size_for_shapes(self):
        assert not self.infer_shapes()
        self._needed = sum(int(np.prod(s)) for n, s in self._shapes.items() if not n.startswith("past")) * 4
        return self._needed

    def set_device_memory(self, memory, size):
        self._cuda.find(memory, size, self._cuda.device)
        self._scratch = (memory, size)

    def set_tensor_address(self, name, memory):
        assert name in self.engine._tensors and memory and memory % 256 == 0, f"{name} at {memory}"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        assert stream_handle and not self.infer_shapes() and self._profile is not None
        assert self._scratch[1] >= self._needed, "the scratch memory is too small for these shapes"
        capturing = self._cuda.captured is not None
        assert self._settled or not capturing, "captured before a plain run with these shapes"
        if capturing and not self.engine._library.capturable:
            return False
        self._settled = True
        if isinstance(self.config, RtxRuntimeConfig) and self.config.cache is not None:
            shapes = [list(shape) for name, shape in sorted(self._shapes.items()) if not name.startswith("past")]
            if shapes not in self.config.cache.kernels:
                self.config.cache.kernels.append(shapes)
        shapes = {name: self.get_tensor_shape(name) for name in self.engine._tensors}
        self._cuda.submit(self._work(shapes, dict(self._addresses), self._scratch, self._generation, capturing))
        return True

    def _work(self, shapes, addresses, scratch, generation, captured):
        engine, cuda = self.engine, self._cuda

        def view(name):
            assert name in addresses, f"{name} has no address"
            kind = np.dtype(TYPES[engine._tensors[name].type])
            size = int(np.prod(shapes[name])) * kind.itemsize
            cuda.find(addresses[name], size, cuda.device)
            data = (ctypes.c_uint8 * size).from_address(addresses[name])
            return np.frombuffer(data, np.uint8).view(kind).reshape(shapes[name])

        def work():
            assert not captured or generation == self._generation, "a graph was launched that other shapes outdated"
            cuda.find(*scratch, cuda.device)
            ctypes.memset(scratch[0], 0xAB, self._needed)
            feeds = {name: view(name).copy() for name in engine._inputs}
            assert not any(np.isnan(a).any() for a in feeds.values() if a.dtype != np.int64), "an input is not written"
            results = engine._session.run(None, feeds)
            for tensor, array in zip(engine._session.get_outputs(), results, strict=True):
                if tensor.name.startswith("present"):
                    past = tensor.name.replace("present", "past_key_values")
                    assert addresses[tensor.name] == addresses[past], f"{tensor.name} does not update its input"
                view(tensor.name)[...] = array

        return work


class RtxExecutionContext(IExecutionContext):
    def is_stream_capturable(self, stream):
        return self.engine._library.capturable


def make_library(cuda, rtx=False, version="10.15.1"):
    """A module of the library; ``contexts`` lists the contexts that were made."""
    library = SimpleNamespace(cuda=cuda, rtx=rtx, capturable=True, contexts=[], __version__=version)

    class Logger(ILogger):
        def __init__(self):
            ILogger.__init__(self)
            self.library = library

    Logger.Severity = ILogger.Severity
    library.ILogger = Logger
    library.Runtime = Runtime
    library.TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
    library.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    if rtx:
        library.CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
        strategies = ["LAZY", "EAGER", "NONE"]
        library.DynamicShapesKernelSpecializationStrategy = IntEnum("Specialization", strategies)
    return library


def build(trt, library, onnx, spec, profiles):
    """In place of engines._build: (engine, compute capabilities)."""
    ranges = [{t.name: profile_rules.shapes(t, p) for t in spec.inputs} for p in profiles.values()]
    plan = MAGIC + json.dumps({"onnx": str(onnx), "profiles": ranges}).encode()
    return memoryview(plan), [] if trt.rtx else ["8.9"]
