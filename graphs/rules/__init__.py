"""How visual tokens are ranked: one module a rule; the file's name, with dashes, is the rule's.

A rule's module has ``score(step)``, from what a step offers to a score of every visual token, float32 [B, N]; of equal
scores the lowest index counts as the higher. ``NEEDS_ATTENTION`` says whether it reads a layer, ``SEEDED`` whether the
seed changes it. Shapes: B rows, S tokens of this step, N visual tokens, W live window of the scoring layer's caches.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtrim.graphs.errors import GraphError

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmtrim.graphs.ops import Ops
    from vlmtrim.graphs.surgery.anatomy import Layer
    from vlmtrim.graphs.surgery.select import Counts


@dataclass(frozen=True)
class Step:
    """What a rule may read.

    Attributes:
        before: the last layer that runs on all tokens; None where the selection comes before the first.
        last_index: int64 [B], each row's last real token.
        visual_positions: int64 [B, N].
        seed: of the rules that draw or shift.
    """

    ops: Ops
    before: Layer | None
    last_index: ir.Value
    visual_positions: ir.Value
    sizes: Counts
    seed: int

    @property
    def layer(self) -> Layer:
        """The layer whose attention scores. Raises GraphError where there is none."""
        if self.before is None:
            raise GraphError("there is no layer before the selection whose attention could score: give k = 1 or more")
        return self.before


def rule_names() -> list[str]:
    """Names of the rules, from the files there are; nothing is imported."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[!_]*.py"))


def load_rule(name: str) -> Any:
    """The module of a rule in :func:`rule_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
