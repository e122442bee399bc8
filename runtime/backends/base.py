"""What a backend is: it opens graphs, holds caches, runs; the checks are written once, here."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import Contract, GraphSpec, TensorSpec, cache_names
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.measure.machine import free_memory

# A tensor of the backend, on its device; only the backend looks inside.
Tensor = Any
# (dtype, dims) of a tensor as a library opened it; a dim is a size, a name, or None where it is open.
Opened = tuple[str, Sequence[int | str | None]]


class Graph(ABC):
    """One opened graph.

    ``run`` takes arrays of the host (:mod:`vlmtrim.runtime.dtypes`) or tensors of the same backend and returns tensors
    of the backend, which hold until the graph's next run. Inputs that are bound as caches are not fed, and their
    outputs are not returned: the graph updates them in place.

    What a library says of the graph that it opened is held to the contract before the first run, what a run returns
    after each: memory is read by these shapes.
    """

    def __init__(self, spec: GraphSpec, dims: Mapping[str, tuple[int, int]]):
        self.spec = spec
        self._dims = dims
        self._bound: Mapping[str, Tensor] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check the feeds against the contract and run. Raises RuntimeRefusal naming the tensor at fault."""
        expected = [tensor for tensor in self.spec.inputs if tensor.name not in self._bound]
        missing = {t.name for t in expected} ^ set(feeds)
        if missing:
            raise RuntimeRefusal(f"{self.spec.file}: fed and promised inputs differ in {', '.join(sorted(missing))}")
        sizes: dict[str, int] = {}
        for tensor in expected:
            self._check(tensor, feeds[tensor.name], sizes)
        outputs = self._run(feeds, sizes)
        for tensor in self.spec.outputs:
            if tensor.name in outputs and not self._fits(tensor, self._describe(outputs[tensor.name]), sizes):
                shape, dtype = self._describe(outputs[tensor.name])
                raise RuntimeRefusal(
                    f"{self.spec.file} returned {tensor.name} as {dtype} {list(shape)}, "
                    f"the contract promises {tensor.dtype} {list(tensor.shape)}; export the model again"
                )
        return outputs

    def bind_caches(self, caches: Mapping[str, Tensor]) -> None:
        """Bind every cache input, and the output that updates it, to one buffer; the same ones again cost nothing."""
        if caches is not self._bound:
            self._bound = caches
            self._bind_caches(caches)

    def _check(self, tensor: TensorSpec, fed: Tensor, sizes: dict[str, int]) -> None:
        shape, dtype = self._describe(fed)
        wrong = not self._fits(tensor, (shape, dtype), sizes)
        for dim, size in zip(tensor.shape, shape, strict=False):
            low, high = self._dims.get(dim, (0, size)) if isinstance(dim, str) else (size, size)
            if not low <= size <= high:
                raise RuntimeRefusal(
                    f"{self.spec.file}: {dim} of {tensor.name} is {size}, the bundle allows {low} to {high}; "
                    "export with larger limits (--max-seq-len, --max-batch)"
                )
        if wrong:
            raise RuntimeRefusal(
                f"{self.spec.file}: {tensor.name} is {dtype} {list(shape)}, "
                f"the contract promises {tensor.dtype} {list(tensor.shape)}"
            )

    @staticmethod
    def _fits(tensor: TensorSpec, found: tuple[tuple[int, ...], str], sizes: dict[str, int]) -> bool:
        """Whether a (shape, dtype) is what was promised; sizes of symbolic dims are noted in ``sizes``, the first time
        that they are seen."""
        shape, dtype = found
        if dtype != tensor.dtype or len(shape) != len(tensor.shape):
            return False
        return all(
            size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for dim, size in zip(tensor.shape, shape, strict=True)
        )

    def _describe(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """(shape, dtype name) of an array of the host or a tensor of the backend."""
        if isinstance(tensor, dtypes.HostArray):
            return dtypes.describe(tensor)
        return tuple(tensor.shape), str(tensor.dtype)

    @abstractmethod
    def _run(self, feeds: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Run on feeds that fit the contract; ``sizes`` are those of the symbolic dims that the feeds have."""

    @abstractmethod
    def _bind_caches(self, caches: Mapping[str, Tensor]) -> None: ...


def check_boundary(file: str, promised: Sequence[TensorSpec], opened: Mapping[str, Opened], whole: bool) -> None:
    """Raise RuntimeRefusal unless what a library opened has the inputs, or outputs, that the contract promises.

    Args:
        file: of the graph, for the message.
        promised: by the contract.
        opened: by name, as the library has them.
        whole: False where the library may leave out what the graph does not use.
    """
    wanted = {tensor.name: tensor for tensor in promised}
    missing = (wanted.keys() - opened.keys() if whole else set()) | (opened.keys() - wanted.keys())
    if missing:
        raise RuntimeRefusal(f"{file}: the graph and the contract differ in {min(missing)}; export the model again")
    for name, (dtype, dims) in opened.items():
        tensor = wanted[name]
        same = dtype == tensor.dtype and len(dims) == len(tensor.shape)
        if not same or not all(_same_dim(dim, want) for dim, want in zip(dims, tensor.shape, strict=True)):
            raise RuntimeRefusal(
                f"{file}: the graph has {name} as {dtype} [{', '.join(map(str, dims))}], the contract promises "
                f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]; export the model again"
            )


def _same_dim(found: int | str | None, promised: int | str) -> bool:
    return found == promised or (found is None and isinstance(promised, str))


class Chain:
    """Several graphs that do one's work one after the other; to the outside it is a :class:`Graph`.

    Behind a selection of image features whose number depends on the data, a chain does what one graph cannot: it reads
    the number, and the later graphs run on so many features instead of the bound.

    Args:
        graphs: in order.
        to_host: the backend's.
    """

    def __init__(self, graphs: Sequence[Graph], to_host: Callable[[Tensor], np.ndarray]):
        self._graphs, self._to_host = graphs, to_host
        self._caches: Mapping[str, Tensor] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run every graph on the feeds and on what earlier ones returned; returns all that was returned."""
        known = dict(feeds)
        for graph in self._graphs:
            wanted = (tensor.name for tensor in graph.spec.inputs)
            found = graph.run({name: known[name] for name in wanted if name not in self._caches and name in known})
            if "kept_counts" in found and known["image_numbers"].shape[1]:
                found["kept_counts"] = counts = self._to_host(found["kept_counts"])
                found["kept_features"] = self._to_host(found["kept_features"])[:, : counts.max()].copy()
            known |= found
        return {name: value for name, value in known.items() if name not in feeds}

    def bind_caches(self, caches: Mapping[str, Tensor]) -> None:
        """Bind to every graph the caches of its own layers."""
        if caches is self._caches:
            return
        self._caches = caches
        for graph in self._graphs:
            names = {tensor.name for tensor in graph.spec.inputs}
            graph.bind_caches({name: value for name, value in caches.items() if name in names})


class Backend(ABC):
    """An inference library on a device; ``chained`` says whether it runs a graph in the pieces of its chain."""

    name: str
    chained = False

    def check(self, folder: Path, contract: Contract) -> None:  # noqa: B027 - most libraries take every bundle
        """Raise RuntimeRefusal where the bundle cannot run on this backend; opens nothing."""

    def open(self, folder: Path, contract: Contract, graph: str) -> Graph | Chain:
        """Open a graph of a bundle by its name in the contract."""
        names = contract.chain(graph) if self.chained else (graph,)
        graphs = [self._open(folder, contract.graphs[name], contract.dims) for name in names]
        return graphs[0] if len(graphs) == 1 else Chain(graphs, self.to_host)

    def window(self, length: int, capacity: int) -> int:
        """Live window to give a decoder whose caches hold ``length`` entries after the step: ``length`` at least,
        ``capacity`` at most. What is behind a query's own position is masked, so a longer one changes no result."""
        return length

    def mark(self) -> Any:
        """A point in the device's work, for :meth:`elapsed`; on the host's clock where the backend has no other."""
        return time.perf_counter()

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits until the second is reached."""
        return end - start

    def memory(self) -> dict[str, int]:
        """Bytes of device memory by use, where the backend knows: engines, caches, activations, io."""
        return {}

    def make_caches(self, contract: Contract, batch: int) -> dict[str, Tensor]:
        """Zeroed caches of all groups, by input name. Raises RuntimeRefusal where they do not fit into memory."""
        needed, free = sum(group.nbytes(batch, contract.dtype) for group in contract.groups), free_memory()
        if needed > free:
            raise RuntimeRefusal(
                f"the caches of {batch} row(s) take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free; "
                "export with a smaller --max-seq-len or --max-batch"
            )
        caches = {}
        for group in contract.groups:
            shape = (batch, group.kv_heads, group.capacity, group.head_size)
            for layer in group.layers:
                for past, _ in cache_names(layer):
                    caches[past] = self.zeros(shape, contract.dtype)
        return caches

    @abstractmethod
    def _open(self, folder: Path, spec: GraphSpec, dims: Mapping[str, tuple[int, int]]) -> Graph: ...

    @abstractmethod
    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A zeroed tensor on the device."""

    @abstractmethod
    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Copy of a tensor as a numpy array, float32 for bfloat16; waits until it is computed."""

    @abstractmethod
    def reshape(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same data under another shape. Raises RuntimeRefusal where it has not as many elements."""

    @abstractmethod
    def rows(self, tensor: Tensor, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count`` of a tensor, on the same memory. Raises RuntimeRefusal where the library
        cannot bind memory that begins there."""

    @abstractmethod
    def copy_entries(self, source: Tensor, target: Tensor, entries: int) -> None:
        """Copy the first ``entries`` of one row of a cache to another; both are [1, KV, C, Dh]."""
