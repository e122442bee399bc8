"""Trimmed-Llama (arXiv 2504.00557): cross-attention layers share the image features that the first one looks at."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmtrim.graphs.contract import IMAGES, NO_ENTRY, CacheGroup, most_features
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, ir, region, select, split
from vlmtrim.graphs.methods import flag
from vlmtrim.graphs.ops import Ops

if TYPE_CHECKING:
    from vlmtrim.graphs.surgery.anatomy import Layer

# The published models keep 2.5 to 3.4 times the ratio on average: 61.5 % at 0.25 (11B), 51 % at 0.15 (90B).
UNION_OVER_RATIO = 3.5
_NEVER = float(2**24)  # larger than any place in a list of candidates, exact in float32


@dataclass(frozen=True)
class TrimmedLlama:
    """Select once per step, in the first cross-attention layer; a step without pictures keeps what there is.

    Rules:
    1. score of a feature, per query head = sum over this step's tokens that see a picture of the attention they pay
       it in the first cross-attention layer; filling (tiles of no picture) is never chosen;
    2. each head chooses the ``round(ratio * n)`` (at least one) features of highest score among the step's n, ties:
       lowest index first; their union stays;
    3. a union of more than ``bound`` of the step's features is cut to it: the features of the best rank in any head
       stay, among equal ranks those of the first head;
    4. the first layer itself attends to all of the step's features; the later ones take the kept features, in order,
       and the caches of all of them, the first included, hold only those (the paper's figure 2);
    5. a token none of whose features were kept passes the later layers unchanged.

    Attributes:
        ratio: share of the features that a head chooses, 0 < ratio <= 1.
        bound: share of the features that the caches take at most, ratio <= bound <= 1. A graph for engines needs one:
            the union's size depends on the data. None for ``min(1, 3.5 * ratio)``.

    Raises:
        GraphError: the decoder has fewer than two cross-attention layers.
    """

    ratio: float = flag(0.25, "share of image features a head keeps (0.25)")
    bound: float | None = flag(
        None, "share of image features that the caches hold at most (default 3.5 times --ratio)", type=float
    )

    name: ClassVar[str] = "trimmed-llama"
    prunes: ClassVar[str] = IMAGES

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio!r}: give the share of features that a head keeps, 0 < ratio <= 1")
        if self.bound is not None and not self.ratio <= self.bound <= 1:
            raise ValueError(f"bound is {self.bound!r}: give the share that the caches take, {self.ratio:g} to 1")

    @property
    def most(self) -> float:
        """The bound that is in effect."""
        return min(1.0, UNION_OVER_RATIO * self.ratio) if self.bound is None else self.bound

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        bound = "" if self.bound is None else f"-bound{self.bound:g}"
        return f"trimmed-llama-ratio{self.ratio:g}{bound}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self), "bound": self.most}

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """The cache groups of the trimmed model; ``visual_tokens`` features of a conversation are cut to the bound."""
        capacity = max(1, most_features(visual_tokens, self.most))
        return tuple(
            dataclasses.replace(group, most=self.most, capacity=capacity) if group.source == IMAGES else group
            for group in dense
        )

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Insert the selection into a decoder graph, in place, and return it.

        Args:
            model: decoder with the boundary of :mod:`vlmtrim.graphs.contract` and cross-attention, no selection yet.
            visual_tokens: image features of a whole conversation, which the dense caches hold; 0 leaves every
                capacity as it is.
            grid: of a picture's visual tokens; not needed here.
        """
        layers = [layer for layer in anatomy.find_layers(model) if layer.crosses]
        if len(layers) < 2:
            raise GraphError(
                f"the decoder has {len(layers)} cross-attention layers; trimmed-llama shares the choice of the first "
                "with the others, so it needs two"
            )
        first = layers[0]
        seam = anatomy.seam_before(model, anatomy.find_layers(model), first.index + 1)
        early = region.upstream(seam) | {first.key_update, first.value_update}
        early |= region.upstream(first.key_update.outputs[0]) | region.upstream(first.value_update.outputs[0])
        later = [node for node in model.graph if node not in early]

        trim = _Trim(model, first, self)
        trim.widen_first_layer()
        kept = trim.choose()
        trim.write_kept(kept)
        roots = {seam: seam, trim.features: kept.features, trim.entries: kept.entries}
        side = region.SideInputs(roots, shape_only=None, suffix=".kept")
        side.rewire(later)
        heavy = next((node for node in side.cloned if node.op_type in ("Attention", "TensorScatter")), None)
        if heavy is not None:
            raise GraphError(f"{heavy.name} feeds later layers and is computed before the selection")
        for node in region.downstream(trim.entries) & early:
            split.rename_dims(node, {trim.window: f"{trim.window}N"})
        for node in [*later, *side.cloned]:
            split.rename_dims(node, {"N": "Nk"})
        if visual_tokens:
            split.shrink_caches(layers, max(1, most_features(visual_tokens, self.most)))
        model.graph.extend([*trim.ops.nodes, *side.cloned])
        model.graph.outputs[1:1] = [kept.indices, kept.counts]
        split.drop_unused(model)
        model.graph.sort()
        return model


@dataclass(frozen=True)
class Union:
    """What the heads choose together; shapes: H heads, N features, K most features that a head chooses.

    Without a sort of the union, NonZero or a data-dependent shape, which TensorRT lacks: all choices form a list by
    rank, then head; a feature's place is its first one in it, and the bound admits the first so many distinct ones.
    """

    ops: Ops
    heads: int
    ratio: float
    most: float
    most_count: int

    def keep(self, scores: ir.Value, numbers: ir.Value) -> ir.Value:
        """scores float32 [B, H, N], image numbers int64 [B, N] -> 0/1 int64 [B, N]."""
        ops = self.ops
        alive = ops("GreaterOrEqual", numbers, ops.const([0]))
        scores = ops("Where", ops("Unsqueeze", alive, ops.const([1])), scores, ops.const(-1.0, np.float32))
        table = [0, *(max(1, round(self.ratio * n)) for n in range(1, self.most_count + 1))]
        if table[-1] * self.heads >= _NEVER:
            raise GraphError(
                f"{self.heads} heads that choose {table[-1]} features each have more places than float32 counts "
                f"exactly ({int(_NEVER)}); give a smaller ratio, or fewer pictures"
            )
        per_head = ops.const(table)
        most_chosen = ops("Gather", per_head, ops.dim(numbers, 1))  # K, where every feature is alive
        chosen_count = ops("Gather", per_head, ops("ReduceSum", ops("Cast", alive, to=7), ops.const([1]), keepdims=1))
        chosen = select.top(ops, scores, most_chosen, table[-1], largest=True, axis=2)  # [B, H, K]
        rank = ops("Range", ops.const(0), ops("Squeeze", most_chosen, ops.const([0])), ops.const(1))
        head = ops.const(np.arange(self.heads)[None, :, None])
        place = ops("Cast", ops("Add", ops("Mul", rank, ops.const([self.heads])), head), to=ir.DataType.FLOAT)
        never = ops.const(_NEVER, np.float32)
        updates = ops("Where", ops("Less", rank, ops("Unsqueeze", chosen_count, ops.const([2]))), place, never)
        places = ops("ScatterElements", ops("Expand", never, ops("Shape", scores)), chosen, updates, axis=2)
        first = ops("ReduceMin", places, ops.const([1]), keepdims=0)  # [B, N]
        return self._within_bound(first, self._listed(place, most_chosen), self._listed(chosen, most_chosen), numbers)

    def bound(self, numbers: ir.Value) -> ir.Value:
        """Features that may stay, [1]."""
        table = [most_features(n, self.most) for n in range(self.most_count + 1)]
        return self.ops("Gather", self.ops.const(table), self.ops.dim(numbers, 1))

    def _listed(self, by_head: ir.Value, most_chosen: ir.Value) -> ir.Value:
        """[., H, K] -> [., K H], by rank, then head."""
        ops = self.ops
        shape = ops.concat(ops.dim(by_head, 0), ops("Mul", most_chosen, ops.const([self.heads])))
        return ops("Reshape", ops("Transpose", by_head, perm=[0, 2, 1]), shape)

    def _within_bound(self, first: ir.Value, place: ir.Value, listed: ir.Value, numbers: ir.Value) -> ir.Value:
        """Chosen, and among the first of the list that the bound admits."""
        ops = self.ops
        is_first = ops("Equal", ops("GatherElements", first, listed, axis=1), place)
        distinct = ops("CumSum", ops("Cast", is_first, to=ir.DataType.INT64), ops.const(1))
        is_chosen = ops("Less", first, ops.const(_NEVER, np.float32))
        at = ops("Cast", ops("Where", is_chosen, first, ops.const(0.0, np.float32)), to=ir.DataType.INT64)
        within = ops("LessOrEqual", ops("GatherElements", distinct, at, axis=1), self.bound(numbers))
        return ops("Cast", ops("And", is_chosen, within), to=ir.DataType.INT64)


@dataclass(frozen=True)
class _Kept:
    """indices [B, Nk] of features, counts [B], features [B, Nk, D], image numbers of all entries [B, W]."""

    indices: ir.Value
    counts: ir.Value
    features: ir.Value
    entries: ir.Value


class _Trim:
    """The parts of the pass; shapes: H query heads, KV key heads."""

    def __init__(self, model: ir.Model, first: Layer, method: TrimmedLlama):
        self.ops = ops = Ops("trim")
        self.first, self.ratio, self.most = first, method.ratio, method.most
        self.features = anatomy.graph_input(model, "image_features")
        self.numbers = anatomy.graph_input(model, "image_numbers")
        self.seen = anatomy.graph_input(model, "seen_images")
        self.last_index = anatomy.graph_input(model, "last_index")
        window = first.write_indices.name or ""
        self.held = anatomy.graph_input(model, window.replace("write_indices", "key_images"))
        updates = [node for node, _ in self.held.uses() if node.op_type == "ScatterElements"]
        if len(updates) != 1:
            raise GraphError(f"{self.held.name} is completed by {len(updates)} ScatterElements; expected one")
        self.entries = updates[0].outputs[0]
        self.batch, self.count = ops.dim(self.numbers, 0), ops.dim(self.numbers, 1)
        self.held_count = ops.dim(self.held, 1)
        self.window = str(self.held.shape[1]) if self.held.shape is not None else ""
        cache = first.key_cache.shape
        query = first.query.shape
        assert cache is not None and query is not None
        self.heads, self.kv_heads, self.most_count = int(query[1]), int(cache[1]), int(cache[2])  # type: ignore[arg-type]

    def widen_first_layer(self) -> None:
        """Let the first layer attend to what the caches held before the step, and all new features behind it."""
        ops = self.ops
        for place, update, cache in (
            (1, self.first.key_update, self.first.key_cache),
            (2, self.first.value_update, self.first.value_cache),
        ):
            held = ops.slice(cache, ops.const([0]), self.held_count, axis=2)
            self.first.attention.replace_input_with(place, ops("Concat", held, update.inputs[1], axis=2))
        entries = ops("Concat", self.held, self.numbers, axis=1)
        entries.type, entries.shape = self.entries.type, ir.Shape(("B", f"{self.window}N"))
        self.entries.replace_all_uses_with(entries)
        self.entries = entries

    def choose(self) -> _Kept:
        """The union of what the heads choose, at most the bound."""
        union = Union(self.ops, self.heads, self.ratio, self.most, self.most_count)
        return self._gather(union.keep(self._scores(), self.numbers), union.bound(self.numbers))

    def _scores(self) -> ir.Value:
        """Sum over the tokens that see a picture of the first layer's attention to each new feature: [B, H, N]."""
        ops, first = self.ops, self.first
        size = int(first.key_cache.shape[3])  # type: ignore[index, arg-type]
        query, factor = anatomy.before_scaling(first.query)
        rows = ops("Reshape", query, ops.const([0, self.kv_heads, -1, size]))
        if factor is not None:
            rows = ops("Mul", rows, factor)
        key = first.attention.inputs[1]
        logits = ops("MatMul", rows, ops("Transpose", key, perm=[0, 1, 3, 2]))
        tokens, width = ops.dim(self.seen, 1), ops("Add", self.held_count, self.count)
        logits = ops("Reshape", logits, ops.concat(self.batch, ops.const([self.heads]), tokens, width))
        logits = ops("Cast", logits, to=ir.DataType.FLOAT)
        if first.scale != 1.0:
            logits = ops("Mul", logits, ops.const(first.scale, np.float32))
        mask = first.attention.inputs[3]
        probabilities = ops("Softmax", ops("Add", logits, ops("Cast", mask, to=ir.DataType.FLOAT)), axis=-1)
        new = ops.slice(probabilities, self.held_count, width, axis=3)
        token = ops("Range", ops.const(0), ops("Squeeze", tokens, ops.const([0])), ops.const(1))
        real = ops("LessOrEqual", token, ops("Unsqueeze", self.last_index, ops.const([1])))
        start = ops("Squeeze", ops.slice(self.seen, ops.const([0]), ops.const([1]), axis=2), ops.const([2]))
        counted = ops("And", real, ops("GreaterOrEqual", start, ops.const([0])))
        weights = ops("Unsqueeze", ops("Cast", counted, to=ir.DataType.FLOAT), ops.const([1, 2]))
        return ops("Squeeze", ops("MatMul", weights, new), ops.const([2]))

    def _gather(self, keep: ir.Value, bound: ir.Value) -> _Kept:
        ops = self.ops
        total = ops("ReduceSum", keep, ops.const([1]), keepdims=1)  # [B, 1]
        order = select.kept_first(ops, keep, self.count, total)
        indices = ops.slice(order, ops.const([0]), bound, axis=1)
        # A slice of a range: TensorRT cannot allocate as many entries as a table says, since it knows no limit of that.
        place = ops("Range", ops.const(0), ops("Squeeze", self.count, ops.const([0])), ops.const(1))
        slot = ops.slice(place, ops.const([0]), bound, axis=0)
        numbers = ops("GatherElements", self.numbers, indices, axis=1)
        numbers = ops("Where", ops("Less", slot, total), numbers, ops.const([NO_ENTRY]))
        slots = ops("Add", ops("Unsqueeze", self.first.write_indices, ops.const([1])), slot)
        entries = ops("ScatterElements", self.held, slots, numbers, axis=1)
        features = select.gather_tokens(ops, self.features, indices)
        counts = ops("Squeeze", total, ops.const([1]))
        for value, shape in ((indices, ("B", "Nk")), (counts, ("B",)), (entries, ("B", self.window))):
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(shape)
        features.type = self.features.type
        features.shape = ir.Shape(("B", "Nk", *list(self.features.shape or ())[2:]))
        indices.name, counts.name, entries.name = "kept_features", "kept_counts", "kept_images"
        return _Kept(indices, counts, features, entries)

    def write_kept(self, kept: _Kept) -> None:
        """Let the first layer's caches take the kept keys and values only."""
        ops = self.ops
        for update in (self.first.key_update, self.first.value_update):
            new = update.inputs[1]
            assert new is not None
            by_entry = ops("Transpose", new, perm=[0, 2, 1, 3])
            kept_rows = select.gather_tokens(ops, by_entry, kept.indices)
            update.replace_input_with(1, ops("Transpose", kept_rows, perm=[0, 2, 1, 3]))


METHOD = TrimmedLlama
