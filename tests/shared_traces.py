"""Traces that test processes share: tracing is most of what exporting a tiny model takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import onnx_ir as ir


class SharedTraces(MutableMapping):
    """Name of a graph -> traced graph, in a folder; ``key`` says of what, in any words.

    Weights are placeholders of no memory that every export binds to its checkpoint anew; so is what is written here, in
    ONNX's own form for data in a file, which does not exist.
    """

    def __init__(self, folder: Path, key: str):
        self._folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._loaded: dict[str, ir.Model] = {}

    def __getitem__(self, name: str) -> ir.Model:
        if name not in self._loaded:
            path = self._folder / name
            if not path.is_file():
                raise KeyError(name)
            self._loaded[name] = ir.load(path)
        return self._loaded[name]

    def __setitem__(self, name: str, model: ir.Model) -> None:
        self._loaded[name] = model
        copy = model.clone()
        for key, value in copy.graph.initializers.items():
            stored = value.const_value
            if key.startswith("full.") and stored.size > 1 and not any(stored.raw.stride()):  # one number, expanded
                value.const_value = ir.ExternalTensor(
                    "nowhere", 0, stored.nbytes, value.dtype, shape=value.shape, name=key
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{name}.{id(self)}.partial"
        ir.save(copy, partial)
        partial.rename(self._folder / name)

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        return iter(path.name for path in self._folder.iterdir())

    def __len__(self) -> int:
        return len(list(self))
