"""A backend whose graphs run through a hook: for clocks and comparisons, without the session knowing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Tensor

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# hook(name of the graph, feeds, run) -> outputs; it calls run once, with these feeds or others.
Hook = Callable[[str, Mapping[str, Tensor], Run], dict[str, Tensor]]


def watch(backend: Backend, hook: Hook) -> Backend:
    """``backend`` as it is, except that every run of a graph that it opens goes through ``hook``."""
    return cast(Backend, _WatchedBackend(backend, hook))


class _WatchedBackend:
    def __init__(self, backend: Backend, hook: Hook):
        self._backend = backend
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def open(self, folder: Path, contract: Contract, graph: str) -> _WatchedGraph:
        return _WatchedGraph(graph, self._backend.open(folder, contract, graph), self._hook)


class _WatchedGraph:
    def __init__(self, name: str, graph: Graph | Chain, hook: Hook):
        self._name = name
        self._graph = graph
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._hook(self._name, feeds, self._graph.run)
