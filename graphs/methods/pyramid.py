"""PyramidDrop (arXiv 2410.17247, CVPR 2025): drop visual tokens in stages, more of them the deeper the layer."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from vlmtrim.graphs.contract import TOKENS, CacheGroup, kept_count
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, ir, select, split
from vlmtrim.graphs.methods import flag
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step, load_rule

Stages = tuple[tuple[int, float], ...]
HALVES = (0.5, 0.25, 0.125)  # what stays from a quarter, half and three quarters of the depth on


def read_stages(text: str) -> Stages:
    """``8:0.5,16:0.25`` -> ((8, 0.5), (16, 0.25)). Raises argparse.ArgumentTypeError."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(layer), float(share)) for layer, share in pairs)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of stages; give LAYER:SHARE, comma after comma, such as 8:0.5,16:0.25"
        ) from error


@dataclass(frozen=True)
class Pyramid:
    """Select several times in a step, each time among what is left; a step without visual tokens removes nothing.

    Rules, of a stage (layer L, share s):
    1. score = attention that the last real token would pay in layer L itself, mean over query heads, over this step's
       tokens that are left (``own-row``; FEATHER, arXiv 2412.13180: ``no-rope``; ``last-row``: in the layer before);
    2. the ``round(N s)`` visual tokens of highest score stay, of N in the whole step, and every other token; ties:
       lowest index first;
    3. survivors keep their order and their original position ids (the paper numbers them anew);
    4. layers of a stage have caches of their own.

    Attributes:
        stages: (layer, share of the step's visual tokens that stays from it on), layers ascending, shares descending.
            None: a quarter, half and three quarters of the depth, and 0.5, 0.25 and 0.125, as in the paper.
        score: the rule that ranks visual tokens, one that reads attention.

    Raises:
        GraphError: the graph has no such seam; the message names the node.
    """

    stages: tuple[tuple[int, float], ...] | None = flag(
        None,
        "layer:share of visual tokens that STAYS from it on, e.g. 8:0.5,16:0.25 (default: 0.5, 0.25 and 0.125 from a "
        "quarter, half and three quarters of the layers on)",
        type=read_stages,
        metavar="L:S,...",
    )
    score: str = flag(
        "own-row",
        "what ranks visual tokens: the last token's attention in the stage's own layer (own-row, default), in the one "
        "before (last-row), or there without rotary embedding (no-rope)",
        choices=["last-row", "no-rope", "own-row"],
    )

    name: ClassVar[str] = "pyramid"
    prunes: ClassVar[str] = TOKENS

    def __post_init__(self) -> None:
        if self.score not in ("last-row", "no-rope", "own-row"):
            raise ValueError(f"score is {self.score!r}: give last-row, no-rope or own-row")
        if self.stages is None:
            return
        layers, shares = [layer for layer, _ in self.stages], [share for _, share in self.stages]
        if not layers or layers != sorted(set(layers)) or layers[0] < 1:
            raise ValueError(f"stages begin at layers {layers}: give layers of 1 or more, each beyond the one before")
        if shares != sorted(set(shares), reverse=True) or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"stages keep {shares}: give shares above 0, up to 1, each below the one before")

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        told = "" if self.stages is None else "-" + "-".join(f"{layer}x{share:g}" for layer, share in self.stages)
        return f"pyramid{told}{'' if self.score == 'own-row' else f'-{self.score}'}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self)}

    def of(self, layers: int) -> Stages:
        """The stages of a decoder. Raises GraphError where one lies beyond its layers."""
        stages = self.stages
        if stages is None:
            starts = [round(layers * (i + 1) / 4) for i in range(3)]
            stages = tuple(zip(starts, HALVES, strict=True))
            if starts[0] < 1 or len(set(starts)) < 3:
                raise GraphError(f"the decoder has {layers} layers, too few for three stages: give --stages")
        if stages[-1][0] >= layers:
            raise GraphError(
                f"a stage begins at layer {stages[-1][0]}, the decoder has {layers}: give 1 to {layers - 1}"
            )
        return stages

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """A cache group for the layers before the first stage, and one a stage."""
        if len(dense) != 1:
            raise GraphError(
                f"the decoder has {len(dense)} cache groups; pyramid splits one, of visual tokens and text"
            )
        (whole,) = dense
        stages = self.of(len(whole.layers))
        edges = [layer for layer, _ in stages] + [len(whole.layers)]
        made = [dataclasses.replace(whole, layers=whole.layers[: edges[0]])]
        for index, (first, share) in enumerate(stages):
            capacity = whole.capacity - visual_tokens + kept_count(visual_tokens, 1 - share)
            layers = whole.layers[first : edges[index + 1]]
            made.append(dataclasses.replace(whole, layers=layers, capacity=capacity, removed=1 - share))
        return tuple(made)

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Insert the selections into a decoder graph, in place, and return it.

        Args:
            model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, one cache group, no selection yet.
            visual_tokens: visual tokens that a sequence of full length is assumed to hold; later caches shrink by what
                is removed of them. 0 leaves every capacity as it is.
            grid: of a picture's visual tokens; not needed here.
        """
        layers = anatomy.find_layers(model)
        if any(value.name == "visual_positions" for value in model.graph.inputs):
            raise GraphError("the decoder already selects visual tokens; start from the unpruned export")
        capacity, stages = split.common_capacity(layers), self.of(len(layers))
        if not 0 <= visual_tokens < capacity:
            raise GraphError(f"visual_tokens={visual_tokens} does not fit caches of {capacity} tokens")
        visual = ir.val("visual_positions", dtype=ir.DataType.INT64, shape=("B", "N"))
        model.graph.inputs.insert(3, visual)
        left = _Left(split.whole(model), visual, None, None, 1.0)
        for number, (first, share) in enumerate(stages, 1):
            smaller = capacity - visual_tokens + kept_count(visual_tokens, 1 - share)
            name = "Sk" if number == len(stages) else f"Sk{number}"
            left = self._stage(model, left, first, share, smaller, name)
        assert left.kept is not None and left.scores is not None
        split.name_kept(model, left.kept)
        left.scores.name, left.scores.type = "visual_scores", ir.TensorType(ir.DataType.FLOAT)
        left.scores.shape = ir.Shape(("B", "N"))
        model.graph.outputs.insert(2, left.scores)
        return model

    def _stage(self, model: ir.Model, left: _Left, first: int, share: float, capacity: int, tokens: str) -> _Left:
        layers = anatomy.find_layers(model)
        seam = anatomy.seam_before(model, layers, first)
        ops = Ops(f"select{left.running.group or ''}")
        sizes = _sizes(ops, model, left, share, split.common_capacity(layers[:1]))
        step = Step(
            ops=ops,
            model=model,
            layers=layers[:first],
            embeds=left.running.embeds,
            seam=seam,
            last_index=left.running.last_index,
            visual_positions=left.visual,
            position_ids=left.running.positions,
            sizes=sizes,
            seed=0,
            behind=layers[first],
        )
        scores = load_rule(self.score).score(step)
        # TensorRT-RTX 1.7 cannot build a second stage behind one that names those that go.
        keep = select.keep_best(ops, scores, left.visual, sizes, sizes.removed, by_winners=True)
        survivors = select.compact(ops, keep, left.running.last_index, sizes)
        kept = survivors.kept_indices
        # Of the step's own tokens; the indices of earlier stages are values here, and nothing is gathered by them.
        of_step = kept if left.kept is None else ops("GatherElements", left.kept, kept, axis=1)
        is_visual = ops("ScatterElements", ops("Sub", keep, keep), left.visual, _ones(ops, left.visual), axis=1)
        is_visual = ops("GatherElements", is_visual, kept, axis=1)
        first_visual = select.kept_first(ops, is_visual, sizes.survivors, sizes.kept_visual, clip=True)
        visual = ops.slice(first_visual, ops.const([0]), sizes.kept_visual, axis=1)
        running = split.split_at(model, ops, seam, layers, first, survivors, capacity, left.running, tokens)
        for value, length in ((visual, f"Nk{running.group}"), (of_step, tokens)):  # named, a cut may let them cross
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(("B", length))
        return _Left(running, visual, of_step, left.scores or scores, share)


def _sizes(ops: Ops, model: ir.Model, left: _Left, share: float, most: int) -> select.Counts:
    """Sizes of what is left, off its own shapes: put together from the step's, they overflow in TensorRT-RTX 1.7. How
    many visual tokens stay is looked up by those of the step."""
    tokens, visual = ops.dim(left.running.embeds, 1), ops.dim(left.visual, 1)
    table = ops.const([kept_count(n, 1 - share) for n in range(most + 1)])
    kept = ops("Gather", table, ops.dim(anatomy.graph_input(model, "visual_positions"), 1))
    survivors = ops("Add", ops("Sub", tokens, visual), kept)
    batch = ops.dim(left.running.embeds, 0)
    most_left, removed = kept_count(most, 1 - left.share), 1 - share / left.share
    return select.Counts(batch, tokens, visual, kept, survivors, most_left, removed)


@dataclass(frozen=True)
class _Left:
    """What a stage leaves: what runs, where its visual tokens are, what is left as indices of the step's tokens, the
    first stage's scores, and the share of visual tokens."""

    running: split.Running
    visual: ir.Value
    kept: ir.Value | None
    scores: ir.Value | None
    share: float


def _ones(ops: Ops, like: ir.Value) -> ir.Value:
    return ops("Expand", ops.const([1]), ops("Shape", like))


METHOD = Pyramid
