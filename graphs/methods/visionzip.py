"""VisionZip (arXiv 2412.04467, CVPR 2025): fewer visual tokens leave the tower, some of them means of many.

The only method that works in the vision graph: the decoder is the unpruned one, and a picture is fewer tokens for it.
Nothing looks at the question, so what stays serves every later one as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from vlmtrim.graphs.contract import PATCHES, CacheGroup, kept_count
from vlmtrim.graphs.later import ir, ops, select, tower
from vlmtrim.graphs.methods import flag


@dataclass(frozen=True)
class VisionZip:
    """A picture of P patches becomes ``round(P (1 - r))`` visual tokens, in the tower's last layer that is used.

    Of them ``round(kept contextual)`` are merged, the others dominant: the class token, where the tower has one, and
    the patches that it attends to most (without one: that all patches do), in order. Of the rest every n-th is a
    target; each other one goes to the target whose key, mean over heads, is nearest by cosine, and a merged token is
    the target's state plus the mean of those that went to it, as in the published code. Projected afterwards.

    Attributes:
        r: share of a picture's tokens that is removed, 0 <= r < 1; 0 leaves all as they are.
        contextual: share of what stays that is merged, 0 <= contextual < 1. The paper's 54 + 10, 108 + 20 and 162 + 30
            of 576 are r = 8/9, 7/9 and 2/3 with 0.15625.
    """

    r: float = flag(0.75, "share of visual tokens REMOVED, 0 <= r < 1 (0.75)")
    contextual: float = flag(0.15625, "share of the kept tokens that are merged of the others (0.15625, the paper's)")

    name: ClassVar[str] = "visionzip"
    prunes: ClassVar[str] = PATCHES

    def __post_init__(self) -> None:
        if not 0 <= self.r < 1:
            raise ValueError(f"r is {self.r}; give the share of visual tokens to remove, 0 <= r < 1")
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual is {self.contextual}; give the share of kept tokens to merge, 0 <= share < 1")

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        return f"visionzip-r{self.r:g}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self)}

    def image_tokens(self, patches: int) -> int:
        """Visual tokens that a picture becomes. Raises ValueError where fewer than two would be left."""
        kept = kept_count(patches, self.r)
        if kept < 2:
            raise ValueError(f"r {self.r:g} keeps {kept} of a picture's {patches} visual tokens; give a smaller r")
        return kept

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """The cache groups of the unpruned model: what is gone is gone before the decoder."""
        return dense

    def __call__(self, model: ir.Model, patches: int) -> ir.Model:
        """Keep and merge in a vision graph with the output ``image_features`` [I, P, D], in place, and return it.

        Raises:
            GraphError: its last attention is not over P tokens, or P and a class token before them, or features are
                made of more than that layer's states.
        """
        kept = self.image_tokens(patches)
        if kept == patches:
            return model
        make = ops.Ops("zip")
        last = tower.last_attention(model, patches)
        states, features = tower.features_seam(model, last)
        readers = [(use.node, use.idx) for use in features.uses()]
        found = model.graph.outputs[0]
        width = tuple(found.shape or ())[2:]
        merged = self._kept(make, last, states, patches, kept)
        for node, index in readers:
            node.replace_input_with(index, merged)
        for value in _behind(readers):
            value.shape = None
        found.shape = ir.Shape(("I", kept, *width))
        model.graph.extend(make.nodes)
        model.graph.sort()
        return model

    def _kept(self, make: Any, last: Any, states: ir.Value, patches: int, kept: int) -> ir.Value:
        """States [I, kept, Dv] of the dominant tokens and of the merged ones behind them."""
        merged = min(round(kept * self.contextual), kept - 1 - int(last.has_class))
        dominant = kept - merged - int(last.has_class)
        seen = tower.paid(make, last, patches)
        wide = make("Cast", last.key, to=ir.DataType.FLOAT)
        key = make("ReduceMean", wide, make.const([1]), keepdims=0)  # [I, T, Dh]
        parts = []
        if last.has_class:
            first, end = make.const([1]), make.const([patches + 1])
            parts = [make.slice(states, make.const([0]), first, axis=1)]
            states, key = make.slice(states, first, end, axis=1), make.slice(key, first, end, axis=1)
        best = select.top(make, seen, make.const([dominant]), dominant, largest=True)
        ones = make("Expand", make.const([1]), make("Shape", best))
        marks = make("ScatterElements", make("Expand", make.const([0]), make("Shape", seen)), best, ones, axis=1)
        order = select.kept_first(make, marks, make.const([patches]), make.const([dominant]))
        taken = make.slice(order, make.const([0]), make.const([dominant]), axis=1)
        rest = make.slice(order, make.const([dominant]), make.const([patches]), axis=1)
        parts.append(select.gather_tokens(make, states, taken))
        if merged:
            parts.append(_merged(make, select.gather_tokens(make, states, rest), rest, key, patches - dominant, merged))
        return make("Concat", *parts, axis=1)


def _merged(make: Any, states: ir.Value, rest: ir.Value, key: ir.Value, count: int, merged: int) -> ir.Value:
    """[I, merged, Dv]: every n-th of the ``count`` states and the mean of the others whose keys are nearest to its."""
    step = max(1, count // merged)
    targets = list(range(0, count, step))[:merged]
    others = sorted(set(range(count)) - set(targets))
    kept = make("Gather", states, make.const(targets), axis=1)
    if not others:
        return kept
    key = select.gather_tokens(make, key, rest)
    length = make("Sqrt", make("ReduceSum", make("Mul", key, key), make.const([2]), keepdims=1))
    key = make("Div", key, make("Max", length, make.const(1e-12, np.float32)))
    left, right = make("Gather", key, make.const(others), axis=1), make("Gather", key, make.const(targets), axis=1)
    cosine = make("MatMul", left, make("Transpose", right, perm=[0, 2, 1]))
    nearest = make("ArgMax", cosine, axis=2, keepdims=1)  # [I, others, 1]
    joins = make("Cast", make("Equal", nearest, make.const([[list(range(len(targets)))]])), to=ir.DataType.FLOAT)
    joined = make("ReduceSum", joins, make.const([1]), keepdims=1)
    shares = make("Div", joins, make("Max", joined, make.const(1.0, np.float32)))
    shares = make("CastLike", make("Transpose", shares, perm=[0, 2, 1]), states)
    return make("Add", kept, make("MatMul", shares, make("Gather", states, make.const(others), axis=1)))


def _behind(readers: list[tuple[ir.Node, int]]) -> set[ir.Value]:
    """Values that are made of these nodes' outputs."""
    found, waiting = set(), [node for node, _ in readers]
    while waiting:
        for value in waiting.pop().outputs:
            if value not in found:
                found.add(value)
                waiting.extend(value.consumers())
    return found


METHOD = VisionZip
