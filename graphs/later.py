"""The modules that methods and rules are written with, imported when they are first used.

Flags are the fields of methods, and onnx takes a second to import: ``--help`` and refusals of bad arguments do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmtrim.graphs import ops
    from vlmtrim.graphs.foreign import boundary, trim
    from vlmtrim.graphs.surgery import (
        anatomy,
        attention,
        greedy,
        layerwise,
        parts,
        region,
        select,
        split,
        states,
        tower,
    )
else:

    class _Later:
        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    ir, ops = _Later("onnx_ir"), _Later("vlmtrim.graphs.ops")
    boundary, trim = (_Later(f"vlmtrim.graphs.foreign.{name}") for name in ("boundary", "trim"))
    anatomy, attention, greedy, layerwise, parts, region, select, split, states, tower = (
        _Later(f"vlmtrim.graphs.surgery.{name}")
        for name in (
            "anatomy",
            "attention",
            "greedy",
            "layerwise",
            "parts",
            "region",
            "select",
            "split",
            "states",
            "tower",
        )
    )

__all__ = ["anatomy", "attention", "boundary", "greedy", "ir", "layerwise", "ops", "parts", "region", "select"]
__all__ += ["split", "states", "tower", "trim"]
