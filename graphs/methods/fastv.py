"""FastV (arXiv 2403.06764, ECCV 2024): drop visual tokens after layer k by the attention of the last prompt token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from vlmtrim.graphs.contract import TOKENS, CacheGroup, kept_count
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, boundary, ir, select, split, trim
from vlmtrim.graphs.methods import flag
from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import ATTENTION, SEED, VISION, Step, load_rule, rule_names


@dataclass(frozen=True)
class FastV:
    """Select once per step, on entry to layer ``k``; a step without visual tokens removes nothing.

    Rules:
    1. score = attention probabilities of layer k-1 (counted from 0), last real query row, mean over query heads,
       at the visual tokens of this step; other rules: :mod:`vlmtrim.graphs.rules`;
    2. the ``round(N * (1 - r))`` visual tokens of highest score stay, and every other token; ties: lowest index first;
    3. survivors keep their order and their original position ids;
    4. layers >= k get caches of their own, smaller by what is removed of ``visual_tokens``;
    5. k = 0: there is no attention to score with, so the default becomes ``stride``.

    Attributes:
        k: number of decoder layers that run on all tokens, 0 <= k < number of layers.
        r: share of visual tokens that is removed, 0 <= r < 1.
        seed: phase of the stride, or of the random draw.
        score: the rule that ranks visual tokens, a module of :mod:`vlmtrim.graphs.rules`.

    Raises:
        GraphError: the graph has no such seam, or reads token states outside its layers; the message names the node.
    """

    k: int = flag(2, "decoder layers that run on all tokens (default 2)")
    r: float = flag(0.5, "share of visual tokens REMOVED, 0 <= r < 1 (0.5)")
    seed: int = flag(0, "of --score random, and phase of --score stride")
    score: str = flag(
        "last-row",
        "what ranks visual tokens (--list says how): by default last-row, the attention of the prompt's last token",
        choices=rule_names(),
    )

    name: ClassVar[str] = "fastv"
    prunes: ClassVar[str] = TOKENS

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 0:
            raise ValueError(f"k is {self.k!r}: give the number of layers that see all tokens, 0 or more")
        if not 0 <= self.r < 1:
            raise ValueError(f"r is {self.r!r}: give the share of visual tokens to remove, 0 <= r < 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}: give 0 or more")
        if self.score not in rule_names():
            raise ValueError(f"score is {self.score!r}: give one of {', '.join(rule_names())}")
        if self.k == 0 and ATTENTION in self.needs:
            able = [name for name in rule_names() if ATTENTION not in load_rule(name).NEEDS]
            raise ValueError(
                f"score {self.score} needs a layer's attention, k is 0: give k of 1 or more, or one of "
                f"{', '.join(able)}"
            )

    @property
    def rule(self) -> str:
        """The scoring rule that is in effect."""
        return "stride" if self.k == 0 and self.score == "last-row" else self.score

    @property
    def needs(self) -> frozenset[str]:
        """What its rule needs, of the names in :mod:`vlmtrim.graphs.rules`."""
        return load_rule(self.rule).NEEDS

    @property
    def guide(self) -> str | None:
        """Who provides ``guide_scores``: the bundle's own vision graph, or nobody."""
        return VISION if VISION in self.needs else None

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        score = "" if self.score == "last-row" else f"-{self.score}"
        seed = f"-seed{self.seed}" if self.seed and SEED in self.needs else ""
        return f"fastv-k{self.k}-r{self.r:g}{score}{seed}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self), "score": self.rule}

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """The cache groups of the pruned model; later caches shrink by what is removed of ``visual_tokens``."""
        if len(dense) != 1:
            raise GraphError(f"the decoder has {len(dense)} cache groups; fastv splits one, of visual tokens and text")
        (whole,) = dense
        self._check_depth(len(whole.layers))
        later = dataclasses.replace(
            whole,
            layers=whole.layers[self.k :],
            capacity=whole.capacity - visual_tokens + kept_count(visual_tokens, self.r),
            removed=self.r,
        )
        return (dataclasses.replace(whole, layers=whole.layers[: self.k]), later) if self.k else (later,)

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Insert the selection into a decoder graph, in place, and return it.

        Args:
            model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, one cache group, no selection yet; or
                one that others exported, with the boundary of :mod:`vlmtrim.graphs.foreign.boundary`.
            visual_tokens: visual tokens that a sequence of full length is assumed to hold; the later caches shrink
                by what is removed of them. 0 leaves every capacity as it is. Where caches grow: the most that a step
                may have, 16384 where it is 0.
            grid: rows and columns of a picture's visual tokens, for the scores that need it.
        """
        if boundary.is_foreign(model):
            if self.guide is not None:
                raise GraphError(f"score {self.rule} comes from a vision graph of vlmtrim's; choose another score")
            most = visual_tokens or trim.MOST_VISUAL
            return trim.trim(model, trim.Selection(self.k, self.r, self.seed, load_rule(self.rule).score, grid, most))
        return self.insert(model, visual_tokens, grid, load_rule(self.rule).score, self.guide is not None)

    def insert(
        self,
        model: ir.Model,
        visual_tokens: int,
        grid: tuple[int, int] | None,
        rank: Callable[[Step], ir.Value],
        guided: bool = False,
    ) -> ir.Model:
        """The same with any ranking float32 [B, N]; ``guided``: by the input ``guide_scores``, :attr:`Step.guide`."""
        layers = anatomy.find_layers(model)
        self._check_depth(len(layers))
        if any(value.name == "visual_positions" for value in model.graph.inputs):
            raise GraphError("the decoder already selects visual tokens; start from the unpruned export")
        capacity = split.common_capacity(layers)
        saved = visual_tokens - kept_count(visual_tokens, self.r)
        if not 0 <= saved < capacity:
            raise GraphError(f"visual_tokens={visual_tokens} does not fit caches of {capacity} tokens")

        embeds = anatomy.graph_input(model, "inputs_embeds")
        seam = anatomy.seam_before(model, layers, self.k) if self.k else embeds
        visual = ir.val("visual_positions", dtype=ir.DataType.INT64, shape=("B", "N"))
        guide = ir.val("guide_scores", dtype=ir.DataType.FLOAT, shape=("B", "N")) if guided else None
        model.graph.inputs[3:3] = [visual] if guide is None else [visual, guide]
        ops = Ops("select")
        last_index = anatomy.graph_input(model, "last_index")
        # Sizes come from the embeddings: read off the seam, they would tie what follows to what is before it.
        sizes = select.counts(ops, embeds, visual, self.r, most_visual=capacity)
        step = Step(
            ops=ops,
            model=model,
            layers=layers[: self.k],
            embeds=embeds,
            seam=seam,
            last_index=last_index,
            visual_positions=visual,
            position_ids=anatomy.graph_input(model, "position_ids"),
            sizes=sizes,
            seed=self.seed,
            grid=grid,
            guide=guide,
            behind=layers[self.k],
        )
        ranking = rank(step)
        keep = select.keep_best(ops, ranking, visual, sizes, self.r)
        survivors = select.compact(ops, keep, last_index, sizes)
        split.split_at(model, ops, seam, layers, self.k, survivors, capacity - saved, split.whole(model))
        split.name_kept(model, survivors.kept_indices)
        ranking.name, ranking.type = "visual_scores", ir.TensorType(ir.DataType.FLOAT)
        ranking.shape = ir.Shape(("B", "N"))
        model.graph.outputs.insert(2, ranking)
        return model

    def _check_depth(self, layers: int) -> None:
        if self.k >= layers:
            raise GraphError(f"k is {self.k}, the decoder has {layers} layers: give 0 to {layers - 1}")


METHOD = FastV
