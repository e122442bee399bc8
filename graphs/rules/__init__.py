"""How visual tokens are ranked: one module a rule; the file's name, with dashes, is the rule's.

A rule's module has ``score(step)``, from what a step offers to a score of every visual token, float32 [B, N]; of equal
scores the lowest index counts as the higher. ``NEEDS`` names what it reads besides the tokens' embeddings, and COST, if
there is one, what it costs beyond 2 % of a prefill. The docstring's first line is its entry in ``export-vlm --list``.
Shapes: B rows, S tokens of this step, N visual tokens, M of them that stay, D hidden width, W live window of the
scoring layer's caches.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from vlmtrim.graphs.ops import Ops
    from vlmtrim.graphs.surgery.anatomy import Layer
    from vlmtrim.graphs.surgery.attention import Rows
    from vlmtrim.graphs.surgery.select import Counts

# What a rule may need: a layer before the selection; a seed; where tokens lie on the picture, of pictures of one size
# (GRID) or of any size whose positions tell (PLACES); what the vision tower looks at.
ATTENTION, SEED, GRID, PLACES, VISION = "attention", "seed", "grid", "places", "vision"


@dataclass(frozen=True)
class Step:
    """What a rule may read.

    Attributes:
        model: the decoder, before the selection; None where it is not of our own form.
        layers: the layers before the selection; ``behind`` is the first one behind it.
        embeds, seam: [B, S, D], what enters the first layer, and what enters ``behind``.
        last_index: int64 [B], each row's last real token.
        visual_positions: int64 [B, N].
        position_ids: int64 [B, S], or [3, B, S] of time, row and column.
        seed: of the rules that draw or shift.
        grid: rows and columns of a picture's visual tokens, in reading order; None where pictures differ.
        guide: float32 [B, N], what comes from outside to rank by, where anything does.
        probe: attention of the layer before the selection where that is no :class:`Layer`, as in decoders that others
            exported.
    """

    ops: Ops
    model: ir.Model | None
    layers: list[Layer]
    embeds: ir.Value
    seam: ir.Value
    last_index: ir.Value
    visual_positions: ir.Value
    position_ids: ir.Value | None
    sizes: Counts
    seed: int
    grid: tuple[int, int] | None = None
    guide: ir.Value | None = None
    behind: Layer | None = None
    probe: Rows | None = None

    @property
    def rows(self) -> Rows:
        """Attention of the layer before the selection, as far as rules read it. Raises GraphError without one."""
        return self.probe or attention.LayerRows(self.layer)

    @property
    def layer(self) -> Layer:
        """The layer whose attention scores. Raises GraphError where there is none."""
        if not self.layers:
            raise GraphError("there is no layer before the selection whose attention could score: give k = 1 or more")
        return self.layers[-1]

    def own_model(self, rule: str) -> ir.Model:
        """The decoder, for rules that read more of a layer than its attention. Raises GraphError where others exported
        it, and its layers are not of a form that is known."""
        if self.model is None:
            raise GraphError(
                f"score {rule} reads norms and projections of a layer, known in decoders of export-vlm alone"
            )
        return self.model

    def check_place(self, rule: str, any_size: bool) -> None:
        """Raise GraphError where nothing tells where visual tokens lie; ``any_size``: M-RoPE positions will do."""
        tells = any_size and self.position_ids is not None and len(self.position_ids.shape or ()) == 3
        if self.grid is None and not tells:
            raise GraphError(f"score {rule} needs to know where tokens lie on the picture: give grid=(rows, columns)")


def rule_names() -> list[str]:
    """Names of the rules, from the files there are; nothing is imported."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[!_]*.py"))


def described() -> list[str]:
    """A line for each rule: its name, what it ranks by, what it needs and what it costs."""
    lines = []
    for name in rule_names():
        rule = load_rule(name)
        needs = f" [needs {', '.join(sorted(rule.NEEDS))}]" if rule.NEEDS else ""
        costs = f" [costs {rule.COST}]" if hasattr(rule, "COST") else ""
        lines.append(f"    {name:22} {(rule.__doc__ or '').splitlines()[0].rstrip('.')}{needs}{costs}")
    return lines


def load_rule(name: str) -> Any:
    """The module of a rule in :func:`rule_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
