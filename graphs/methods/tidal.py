"""TidalDecode (arXiv 2410.05076): two layers choose which cache entries the layers behind them attend to in a step."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, attention, ir, select, split
from vlmtrim.graphs.methods import flag
from vlmtrim.graphs.ops import Ops

if TYPE_CHECKING:
    from vlmtrim.graphs.surgery.anatomy import Layer

FIRST, AGAIN = 2, 0.4  # by default; the paper's second is 9 or 13 of 32 layers


def read_layers(text: str) -> tuple[int, ...]:
    """``2,13`` -> (2, 13). Raises argparse.ArgumentTypeError."""
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; give numbers from 0, such as 2,13")
    return tuple(map(int, text.split(",")))


@dataclass(frozen=True)
class Tidal:
    """A decode step attends to few cache entries, which two layers choose; caches stay whole, nothing is removed.

    What is saved is the reading of long caches while decoding, not memory, and nothing of a prefill.

    Rules, of a step of one token behind a window of more than ``entries`` cache entries:
    1. layers before the first of ``selecting``, and those of ``selecting``, attend to all entries;
    2. a selecting layer ranks the entries by its own attention, for each key head: softmax in float32 over all that the
       token sees, mean over the query heads that share the key head (the paper: each query head for itself);
    3. the best ``entries`` of them, ties: lowest index first, are what the layers behind attend to, head by head, up to
       the next selecting layer; the token's own entry is always among them;
    4. any other step is the identity: prefills, and windows of no more than ``entries`` entries.
    The paper's cache correction (a prefill of the answer now and then) is not done.

    Attributes:
        entries: how many of a key head's entries a layer attends to.
        selecting: the layers that choose, ascending from 0. None: 2, and the one at two fifths of the depth.

    Raises:
        GraphError: no layer is behind a selecting one, or caches never hold more than ``entries``.
    """

    entries: int = flag(
        1024,
        "cache entries, for each key head, that a layer reads in a decode step (default 1024); saves bandwidth of long "
        "caches while decoding, no memory, no time of a prefill",
    )
    selecting: tuple[int, ...] | None = flag(
        None,
        "layers that choose them, attending to all entries, as those before the first do (default: 2 and the one at "
        "two fifths of the depth, such as 2,13 of 32)",
        type=read_layers,
        metavar="L,...",
    )

    name: ClassVar[str] = "tidal"
    prunes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.entries, int) or self.entries < 1:
            raise ValueError(f"entries is {self.entries!r}: give the number of cache entries to attend to, 1 or more")
        told = self.selecting
        if told is not None and (not told or list(told) != sorted(set(told)) or told[0] < 0):
            raise ValueError(f"selecting is {told!r}: give layers from 0, each beyond the one before")

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        told = "" if self.selecting is None else "-l" + "-".join(map(str, self.selecting))
        return f"tidal-e{self.entries}{told}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self)}

    def of(self, layers: int) -> tuple[int, ...]:
        """The selecting layers of a decoder. Raises GraphError where no layer is behind the last."""
        chosen = self.selecting or tuple(sorted({FIRST, max(FIRST, round(layers * AGAIN))}))
        if chosen[-1] >= layers - 1:
            raise GraphError(
                f"layer {chosen[-1]} would choose entries for the layers behind it, the decoder has {layers} layers: "
                f"give --selecting 0 to {layers - 2}"
            )
        return chosen

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """The unpruned model's, with the layers that attend to chosen entries."""
        if len(dense) != 1:
            raise GraphError(f"the decoder has {len(dense)} cache groups; tidal reads one, of visual tokens and text")
        (whole,) = dense
        chosen = self.of(len(whole.layers))
        self._check_capacity(whole.capacity)
        sparse = tuple(layer for layer in whole.layers if layer > chosen[0] and layer not in chosen)
        return (dataclasses.replace(whole, sparse=sparse, attends=self.entries),)

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Let later layers of a decoder graph attend to chosen entries, in place, and return it.

        Args:
            model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, one cache group, no selection yet.
            visual_tokens, grid: not needed here.
        """
        layers = anatomy.find_layers(model)
        chosen = self.of(len(layers))
        self._check_capacity(split.common_capacity(layers))
        if any(node.op_type == "GatherND" for layer in layers if (node := layer.key.producer()) is not None):
            raise GraphError("a layer attends to chosen entries already; start from the unpruned export")
        if len({layer.mask for layer in layers[:-1]}) > 1:  # the last one's is of one row
            raise GraphError("layers attend under masks of several kinds; tidal reads the same entries in all of them")
        reading = _Reading(model, layers, self.entries)
        entries = None
        for layer in layers:
            if layer.index in chosen:
                entries = reading.choose(layer)
            elif entries is not None:
                reading.rewrite(layer, entries)
        model.graph.extend(reading.ops.nodes)
        split.drop_unused(model)
        model.graph.sort()
        return model

    def _check_capacity(self, capacity: int) -> None:
        if self.entries >= capacity:
            raise GraphError(
                f"caches hold at most {capacity} entries, a layer is to attend to {self.entries} of them: give fewer "
                "--entries, or a larger --max-seq-len"
            )


class _Reading:
    """What the step's layers read of their caches; shapes: W live window, T entries that are attended to."""

    def __init__(self, model: ir.Model, layers: list[Layer], entries: int):
        self.ops = ops = Ops("tidal")
        self._entries = entries
        embeds, last_index = anatomy.graph_input(model, "inputs_embeds"), anatomy.graph_input(model, "last_index")
        slot = anatomy.graph_input(model, "key_positions.0")
        self._batch, self._window = ops.dim(embeds, 0), ops.dim(slot, 0)
        one, none = ops.const([1]), ops.const([0])
        several = ops("Min", ops("Sub", ops.dim(embeds, 1), one), one)
        # Sizes that may be negative by TensorRT's bounds do not build.
        beyond = ops("Min", ops("Max", ops("Sub", self._window, ops.const([entries])), none), one)
        chooses = ops("Mul", ops("Sub", one, several), beyond)  # 1 in a decode step behind a long window, else 0
        self._everything = ops("Sub", one, chooses)
        self._count = ops("Mul", chooses, ops.const([entries]))
        self._size = ops("Add", self._count, ops("Mul", self._everything, self._window))  # T
        self._index = attention.row_index(ops, last_index)
        newest = ops("Unsqueeze", ops("Add", layers[0].write_indices, last_index), ops.const([1, 2]))
        self._seen, self._newest = ops("LessOrEqual", slot, newest), ops("Equal", slot, newest)  # [B, 1, W]
        limit = ops("Where", self._seen, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))
        self._limit = ops("Unsqueeze", limit, one)
        self._masks: dict[ir.Value, ir.Value] = {}

    def choose(self, layer: Layer) -> ir.Value:
        """Indices int64 [B, KV, T, 1] into the caches, ascending, that the layers behind attend to."""
        ops = self.ops
        query, factor = anatomy.before_scaling(layer.query)
        row = attention.query_row(ops, layer, query, factor, self._index, self._batch)
        paid = attention.probabilities(ops, row, layer.key, self._limit, over=(2,))  # [B, KV, W]
        ranking = ops("Where", self._seen, paid, ops.const(-1.0, np.float32))
        ranking = ops("Where", self._newest, ops.const(2.0, np.float32), ranking)
        best = select.top(ops, ranking, self._count, self._entries, largest=True, axis=2)
        mark = ops("Expand", ops.const([1]), ops("Shape", best))
        keep = ops("Expand", self._everything, ops("Shape", ranking))
        keep = ops("ScatterElements", keep, best, mark, axis=2)
        order = select.kept_first(ops, keep, self._window, self._size, axis=2)
        # Where a decoder is cut into a chain, this is what crosses.
        order.name, order.type = f"attended_first.{layer.index}", ir.TensorType(ir.DataType.INT64)
        order.shape = ir.Shape(("B", attention.head_counts(layer)[1], "W0"))
        return ops("Unsqueeze", ops.slice(order, ops.const([0]), self._size, axis=2), ops.const([3]))

    def rewrite(self, layer: Layer, indices: ir.Value) -> None:
        """Let a layer attend to the entries at ``indices``.

        They are ascending and those that the token does not see are the last of the window, so they are masked as the
        first T of the window are.
        """
        ops, node = self.ops, layer.attention
        for place, update in ((1, layer.key_update), (2, layer.value_update)):
            cache = update.outputs[0]
            taken = ops("GatherND", cache, indices, batch_dims=2)  # of the whole cache: a slice would copy the window
            taken.type = cache.type
            taken.shape = ir.Shape((*list(cache.shape or ())[:2], "T", *list(cache.shape or ())[3:]))
            node.replace_input_with(place, taken)
        if layer.mask not in self._masks:
            self._masks[layer.mask] = ops.slice(layer.mask, ops.const([0]), self._size, axis=3)
        node.replace_input_with(3, self._masks[layer.mask])


METHOD = Tidal
