"""TensorRT and TensorRT-RTX, which share one API: vision, embedding and decoder chained on the device.

Every engine has an execution context per profile: decode where it admits the step, else prefill. All contexts compute
in one scratch memory, one after the other on one stream. Caches lie in one allocation per group and are input and
output at one address. A decode step that repeats the shapes and addresses of the one before is replayed as a CUDA
graph; live windows come in buckets so that it does.

Up go token ids and positions, down come logits, in one copy through page-locked memory a step: sampling and its seeds
then are the same code on every backend, and 64 KB (a vocabulary of 32,000 in float16) cross PCIe in a few microseconds.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import Contract, GraphSpec, TensorSpec, cache_names
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.backends.base import Backend, Graph, Opened, Tensor, check_boundary
from vlmtrim.runtime.backends.cuda import ALIGNMENT, CapturedGraph, Device, DeviceTensor, Slot
from vlmtrim.runtime.engines import find_library, fingerprint, import_library, make_logger, user_cache
from vlmtrim.runtime.engines import profiles as profile_rules
from vlmtrim.runtime.errors import RuntimeRefusal

# How decode steps are replayed: by the library itself where it can (TensorRT-RTX, which knows when the kernels of a
# shape are compiled), else by capturing the stream; or always by capturing; or not at all.
CUDA_GRAPHS = ("auto", "capture", "off")
# TensorRT's names of the dtypes, nvinfer1::DataType.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


class Replay:
    """Whether decode steps are captured. The first refusal of the library ends it for all graphs, and is said once."""

    def __init__(self, on: bool):
        self.on = on

    def refuse(self, reason: str) -> None:
        """Launch plainly from now on."""
        print(f"no CUDA graphs: {reason}; decode steps are launched kernel by kernel", file=sys.stderr)
        self.on = False


class Phase:
    """One profile of an engine: its execution context, what is bound to it, and the CUDA graph of its last step."""

    def __init__(self, context: Any, device: Device, scratch: Slot, messages: list[str], replay: Replay):
        self._context, self._device, self._scratch = context, device, scratch
        self._messages, self._replay = messages, replay
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch_at = (0, 0)
        self._scratch_bytes = 0
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._reshaped = self._moved = True
        self._graph: CapturedGraph | None = None

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of inputs; those of the last step stay."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._accept(self._context.set_input_shape(name, shape), f"{name} of shape {list(shape)}")
                self._shapes[name] = shape
                self._reshaped = True

    def output_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an output under the shapes of the inputs."""
        self._settle()
        if name not in self._outputs:
            self._outputs[name] = tuple(self._context.get_tensor_shape(name))
        return self._outputs[name]

    def _settle(self) -> None:
        if not self._reshaped:
            return
        self._reshaped, self._moved, self._outputs = False, True, {}
        missing = self._context.infer_shapes()
        self._accept(not missing, f"a step without shapes of {', '.join(missing)}")
        self._scratch_bytes = int(self._context.update_device_memory_size_for_shapes())

    def bind(self, name: str, address: int) -> None:
        """Address of an input or output."""
        if self._addresses.get(name) != address:
            self._accept(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._addresses[name] = address
            self._moved = True

    def launch(self) -> None:
        """Queue the step: plainly where anything moved since the last one, else as a CUDA graph.

        The plain run comes first because the library settles on shapes in it; the graph belongs to the last step alone,
        since the library may keep what depends on shapes in memory that the next shapes overwrite.
        """
        self._settle()
        address = self._scratch.fit(self._scratch_bytes)
        if self._scratch_at != (address, self._scratch.memory.nbytes):
            self._scratch_at = (address, self._scratch.memory.nbytes)
            self._context.set_device_memory(*self._scratch_at)
            self._moved = True
        if self._moved:
            self._moved, self._graph = False, None
            self._execute()
            return
        if self._graph is None and self._replay.on:
            self._graph = self._capture()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._execute()

    def _execute(self) -> None:
        self._accept(self._enqueue(), "a launch")

    def _enqueue(self) -> bool:
        return self._context.execute_async_v3(int(self._device.stream))

    def _capture(self) -> CapturedGraph | None:
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX
        if capturable is not None and not capturable(int(self._device.stream)):
            self._replay.refuse("the engine cannot be captured")
            return None
        try:
            return self._device.capture(self._enqueue)
        except RuntimeRefusal as error:
            self._replay.refuse(str(error))
            return None

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            said = "; ".join(self._messages[-2:]) or "no reason given"
            raise RuntimeRefusal(f"TensorRT refuses {what}: {said}")


class TrtGraph(Graph):
    """A deserialised engine with a phase per profile. Outputs hold until the graph's next run."""

    def __init__(
        self,
        spec: GraphSpec,
        dims: Mapping[str, tuple[int, int]],
        profiles: Mapping[str, profile_rules.Profile],
        phases: Mapping[str, Phase],
        names: frozenset[str],
        device: Device,
    ):
        super().__init__(spec, dims)
        self._profiles, self._phases, self._names = profiles, phases, names
        tensors = (*spec.inputs, *spec.outputs)
        self._slots = {tensor.name: Slot(device, "io", self._most_bytes(tensor)) for tensor in tensors}
        self._free_outputs = spec.outputs
        self._caches: Mapping[str, Tensor] = {}
        self._bound_to: dict[str, Mapping[str, Tensor]] = {}  # by profile

    def _most_bytes(self, tensor: TensorSpec) -> int | None:
        sizes = [dim if isinstance(dim, int) else self._dims.get(dim, (0, None))[1] for dim in tensor.shape]
        return None if None in sizes else dtypes.nbytes(tuple(size for size in sizes if size is not None), tensor.dtype)

    def _run(self, feeds: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        profile = profile_rules.choose(self._profiles, sizes, self.spec.file)
        phase = self._phases[profile]
        if self._bound_to.get(profile) is not self._caches:
            self._point(phase, self._caches)
            self._bound_to[profile] = self._caches
        fed = {name: value for name, value in feeds.items() if name in self._names}
        phase.set_shapes({name: self._describe(value)[0] for name, value in fed.items()})
        for name, value in fed.items():
            on_device = isinstance(value, DeviceTensor)
            phase.bind(name, value.address if on_device else self._slots[name].load(value))
        results: dict[str, Tensor] = {}
        for tensor in self._free_outputs:
            shape, slot = phase.output_shape(tensor.name), self._slots[tensor.name]
            phase.bind(tensor.name, slot.fit(dtypes.nbytes(shape, tensor.dtype)))
            results[tensor.name] = DeviceTensor(slot.memory.address, shape, tensor.dtype, slot.memory)
        phase.launch()
        return results

    def _bind_caches(self, caches: Mapping[str, Tensor]) -> None:
        """Phases are pointed to them when they run: where prefills have a row of their own, decode steps keep theirs,
        and their CUDA graphs."""
        self._caches = caches
        bound = {past.replace("past_key_values", "present") for past in caches}
        self._free_outputs = tuple(tensor for tensor in self.spec.outputs if tensor.name not in bound)

    @staticmethod
    def _point(phase: Phase, caches: Mapping[str, Tensor]) -> None:
        for past, cache in caches.items():
            phase.set_shapes({past: cache.shape})
            phase.bind(past, cache.address)
            phase.bind(past.replace("past_key_values", "present"), cache.address)


class TrtBackend(Backend):
    """TensorRT or TensorRT-RTX on the first GPU.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        cuda_graphs: one of CUDA_GRAPHS.

    Raises:
        RuntimeRefusal: the library, cuda-python, the driver or a GPU is missing.
    """

    chained = True

    def __init__(self, name: str, cuda_graphs: str = "auto"):
        if cuda_graphs not in CUDA_GRAPHS:
            raise RuntimeRefusal(f"cuda_graphs is {cuda_graphs!r}; give one of {', '.join(CUDA_GRAPHS)}")
        self.name = name
        find_library(name)
        self.device = Device()  # before the import, which takes longer than finding no GPU
        self._trt = import_library(name)
        self._messages: list[str] = []
        self._logger = make_logger(self._trt, self._messages)
        self._runtime = self._trt.Runtime(self._logger)
        self._scratch = Slot(self.device, "activations")
        self._engine_bytes = 0
        # The library's own replay needs no capture of ours.
        self._by_library = cuda_graphs == "auto" and hasattr(self._trt, "CudaGraphStrategy")
        self.replay = Replay(cuda_graphs != "off" and not self._by_library)

    @property
    def version(self) -> str:
        """Version of the library."""
        return str(self._trt.__version__)

    def check(self, folder: Path, contract: Contract) -> None:
        """Raise RuntimeRefusal where a graph has no engine that is made for this library and this GPU."""
        for whole in contract.wholes:
            for graph in contract.chain(whole):
                self._fingerprint(folder, graph)

    def _fingerprint(self, folder: Path, graph: str) -> fingerprint.Fingerprint:
        return fingerprint.find(folder, graph, self.name, self.version, self.device.capability)

    def _open(self, folder: Path, spec: GraphSpec, dims: Mapping[str, tuple[int, int]]) -> Graph:
        stem = Path(spec.file).stem
        profiles = self._fingerprint(folder, stem).profiles
        before = self.device.free_bytes()
        engine = self._load(folder / f"{stem}.engine")
        names = frozenset(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        on_host = sorted(name for name in names if engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE)
        if on_host or engine.num_optimization_profiles != len(profiles):
            raise RuntimeRefusal(
                f"{stem}.engine does not match {fingerprint.FILE} ({engine.num_optimization_profiles} profiles, "
                f"on the host: {on_host}); build it again with: {fingerprint.build_command(folder, self.name)}"
            )
        opened = {name: self._described(engine, name) for name in names}
        for promised in (spec.inputs, spec.outputs):
            own = {tensor.name for tensor in promised}
            there = {name: found for name, found in opened.items() if name in own}
            check_boundary(f"{stem}.engine", promised, there, whole=promised is spec.outputs)
        if strange := names - {tensor.name for tensor in (*spec.inputs, *spec.outputs)}:
            raise RuntimeRefusal(f"{stem}.engine has {min(strange)}, which the contract does not name")
        kernels = Kernels(fingerprint.kernels_key(folder, stem, self.device.name))
        phases = {name: self._phase(engine, index, name, kernels) for index, name in enumerate(profiles)}
        self._engine_bytes += max(before - self.device.free_bytes(), 0)
        graph = TrtGraph(spec, dims, profiles, phases, names, self.device)
        weakref.finalize(graph, kernels.keep)
        return graph

    @staticmethod
    def _described(engine: Any, name: str) -> Opened:
        dtype = str(engine.get_tensor_dtype(name).name)
        return _DTYPES.get(dtype, dtype), [None if dim < 0 else int(dim) for dim in engine.get_tensor_shape(name)]

    def _load(self, path: Path) -> Any:
        self._messages.clear()
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            said = "; ".join(self._messages[-3:]) or "no reason given"
            raise RuntimeRefusal(
                f"{self.name} {self.version} does not load {path.name} on {self.device.name} (compute capability "
                f"{self.device.capability[0]}.{self.device.capability[1]}): {said}; build it again with: "
                f"{fingerprint.build_command(path.parent, self.name)}"
            )
        return engine

    def _phase(self, engine: Any, index: int, profile: str, kernels: Kernels) -> Phase:
        trt, decodes = self._trt, profile == profile_rules.DECODE
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        kernels.use(config)
        if decodes and self._by_library:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if decodes and self.replay.on and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # What is captured stays: it must not be the kernels that only bridge the time of compiling.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        context = engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(index, int(self.device.stream)):
            said = "; ".join(self._messages[-3:]) or "no reason given"
            raise RuntimeRefusal(f"{self.name} cannot make a context for {profile}: {said}")
        replay = self.replay if decodes else Replay(False)
        return Phase(context, self.device, self._scratch, self._messages, replay)

    def window(self, length: int, capacity: int) -> int:
        """In buckets, so that the shapes of decode steps repeat."""
        return profile_rules.bucket(length, capacity)

    def make_caches(self, contract: Contract, batch: int) -> dict[str, Tensor]:
        """Zeroed caches of all groups, one allocation a group; each begins at a multiple of 256 bytes."""
        caches: dict[str, Tensor] = {}
        for group in contract.groups:
            shape = (batch, group.kv_heads, group.capacity, group.head_size)
            names = [past for layer in group.layers for past, _ in cache_names(layer)]
            each = -(-dtypes.nbytes(shape, contract.dtype) // ALIGNMENT) * ALIGNMENT
            memory = self.device.allocate(each * len(names), "caches")
            self.device.zero(memory.address, memory.nbytes)
            for index, name in enumerate(names):
                caches[name] = DeviceTensor(memory.address + index * each, shape, contract.dtype, memory)
        return caches

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A zeroed tensor on the device."""
        memory = self.device.allocate(dtypes.nbytes(shape, dtype), "io")
        self.device.zero(memory.address, memory.nbytes)
        return DeviceTensor(memory.address, shape, dtype, memory)

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Copy of a tensor; waits for the stream."""
        return dtypes.from_raw(self.device.read(tensor.address, tensor.nbytes), tensor.shape, tensor.dtype)

    def reshape(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view of the same memory."""
        view = DeviceTensor(tensor.address, tuple(shape), tensor.dtype, tensor.owner)
        if view.nbytes != tensor.nbytes:
            raise RuntimeRefusal(f"{list(tensor.shape)} cannot be read as {list(shape)}")
        return view

    def rows(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """A view of the same memory. Raises RuntimeRefusal where it would not begin at a multiple of 256 bytes."""
        offset = first * dtypes.nbytes(tensor.shape[1:], tensor.dtype)
        if offset % ALIGNMENT:
            raise RuntimeRefusal(
                f"a row of a cache of {list(tensor.shape)} takes {offset // first} bytes, and TensorRT binds at "
                f"multiples of {ALIGNMENT}; export with a --max-seq-len that makes its {tensor.shape[-2]} entries even"
            )
        return DeviceTensor(tensor.address + offset, (count, *tensor.shape[1:]), tensor.dtype, tensor.owner)

    def copy_entries(self, source: Tensor, target: Tensor, entries: int) -> None:
        """One strided copy on the stream."""
        _, heads, capacity, width = source.shape
        each = dtypes.nbytes((width,), source.dtype)
        self.device.copy_within(target.address, source.address, capacity * each, entries * each, heads)

    def mark(self) -> Any:
        """A CUDA event on the stream."""
        return self.device.mark()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events, by the GPU's clock."""
        return self.device.elapsed(start, end)

    def memory(self) -> dict[str, int]:
        """Bytes on the device: engines as the free memory fell while they were loaded, the rest as allocated."""
        used = {use: self.device.used[use] for use in ("caches", "activations", "io")}
        return {"engines": self._engine_bytes, **used}


class Kernels:
    """What TensorRT-RTX compiled for this GPU out of one engine, kept for the next start; TensorRT needs none."""

    def __init__(self, key: str):
        self._name = f"tensorrt-rtx/{key}.cache"
        self._cache: Any = None
        self._loaded = b""

    def use(self, config: Any) -> None:
        """Let a context compile into the cache and take from it."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self._cache is None:
            self._cache, data = config.create_runtime_cache(), user_cache.read(self._name)
            if data and self._cache.deserialize(data):
                self._loaded = data
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since."""
        if self._cache is None:
            return
        data = bytes(self._cache.serialize())
        if data != self._loaded:
            user_cache.write(self._name, data)
            self._loaded = data
