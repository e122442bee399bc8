"""The modules that methods and rules are written with, imported when they are first used.

Flags are the fields of methods, and onnx takes a second to import: ``--help`` and refusals of bad arguments do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmtrim.graphs.foreign import boundary, trim
    from vlmtrim.graphs.surgery import anatomy, attention, greedy, layerwise, parts, region, select, split, states
else:

    class _Later:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    ir = _Later("onnx_ir")
    boundary, trim = (_Later(f"vlmtrim.graphs.foreign.{name}") for name in ("boundary", "trim"))
    anatomy, attention, greedy, layerwise, parts, region, select, split, states = (
        _Later(f"vlmtrim.graphs.surgery.{name}")
        for name in ("anatomy", "attention", "greedy", "layerwise", "parts", "region", "select", "split", "states")
    )

__all__ = ["anatomy", "attention", "boundary", "greedy", "ir", "layerwise", "parts", "region", "select", "split"]
__all__ += ["states", "trim"]
