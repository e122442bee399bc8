"""Graph passes: ONNX in, ONNX out.

>>> from vlmtrim.graphs import FastV, load, save
>>> model = load("decoder.onnx")            # doctest: +SKIP
>>> save(FastV(k=2, r=0.5)(model), "pruned.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmtrim.graphs.errors import GraphError
    from vlmtrim.graphs.files import load, save
    from vlmtrim.graphs.methods.fastv import FastV

__all__ = ["FastV", "GraphError", "load", "save"]

# Imported on first use: the runtime reads contract.py and bundle.py on devices that have no onnx.
_HOMES = {"FastV": "methods.fastv", "GraphError": "errors", "load": "files", "save": "files"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
