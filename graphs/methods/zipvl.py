"""ZipVL (arXiv 2410.08584): every layer keeps its own visual tokens, as many as its attention asks for."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmtrim.graphs.contract import TOKENS, CacheGroup, most_features
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, attention, ir, layerwise, select, split
from vlmtrim.graphs.methods import flag

if TYPE_CHECKING:
    from vlmtrim.graphs.surgery.anatomy import Layer


def read_budgets(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, deviation) of the share of visual tokens that each layer keeps, of a file that ``--calibrate`` wrote.

    Raises ValueError where it is none.
    """
    try:
        layers = json.loads(Path(path).read_text())["layers"]
        return tuple(float(layer["mean"]) for layer in layers), tuple(float(layer["deviation"]) for layer in layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of budgets as --calibrate writes it ({error!r})") from error


def _bound(text: str) -> float | tuple[float, ...]:
    """A share, or a file: there a layer's mean and one deviation."""
    try:
        return float(text)
    except ValueError:
        pass
    return _argument(lambda: tuple(min(1.0, mean + more) for mean, more in zip(*read_budgets(text), strict=True)))


def _budgets(text: str) -> tuple[float, ...]:
    return _argument(lambda: read_budgets(text)[0])


def _argument(read: Any) -> Any:
    try:
        return read()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class ZipVL:
    """Every layer chooses which of a step's visual tokens attend, are attended to and enter its caches.

    Rules, per layer and row, from this step's own tokens (earlier turns are in the caches and are not judged again):
    1. probe rows: the last ``recent`` tokens up to the last real one, and ``spread`` rows before them at a uniform
       stride (number ``i * rest // spread``); all tokens where there are fewer. Their softmax over the step's tokens,
       in float32, mean over heads;
    2. a = its sum over the probe rows, a token's normalised score = a over the probe rows that see the token;
    3. the budget: as many visual tokens of smallest a are given up as hold at most ``1 - tau`` of all attention, so the
       others and the text hold ``tau``; at most ``bound`` of them stay. With ``budgets`` their number is given instead;
    4. the identity: so many visual tokens of highest normalised score stay, ties: lowest index first; text stays;
       so does the last real token, whatever it is;
    5. what stays is attended to, attends (behind the caches) and enters the caches in order; a token that does not stay
       gets zero from the layer's attention, passes its MLP, and is a candidate of the next layer again.

    Attributes:
        tau: share of the attention that is kept, 0 < tau <= 1.
        bound: share of the visual tokens that a layer keeps at most, one for all layers or one each; 1 cuts nothing.
        budgets: shares that the layers keep, in place of tau and bound; None lets the attention decide.
        recent, spread: probe rows.
    """

    tau: float = flag(0.975, "share of every layer's attention that is kept (default 0.975)")
    bound: float | tuple[float, ...] = flag(
        0.75,
        "share of visual tokens that a layer keeps at most (0.75; 1 never cuts), or a file that --calibrate wrote: its "
        "means and one deviation",
        type=_bound,
        metavar="B|FILE",
    )
    budgets: tuple[float, ...] | None = flag(
        None, "keep the means of a file that --calibrate wrote, whatever --tau says", type=_budgets, metavar="FILE"
    )
    recent: int = flag(16, "probe rows at the end of the prompt (16)")
    spread: int = flag(16, "probe rows before them (16)")

    name: ClassVar[str] = "zipvl"
    prunes: ClassVar[str] = TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is {self.tau!r}: give the share of the attention to keep, 0 < tau <= 1")
        for name, shares in (("bound", self.bound), ("budgets", self.budgets)):
            for share in shares if isinstance(shares, tuple) else () if shares is None else (shares,):
                if not 0 < share <= 1:
                    raise ValueError(f"{name} holds {share!r}: give shares of visual tokens, 0 < share <= 1")
        if self.recent < 1 or self.spread < 0:
            raise ValueError(f"recent is {self.recent}, spread {self.spread}: give 1 or more, and 0 or more")

    @property
    def label(self) -> str:
        """Short name for folders and plots."""
        if self.budgets is not None:
            return f"zipvl-budgets{np.mean(self.budgets):.2f}"
        bound = f"{np.mean(self.bound):.2f}-by-layer" if isinstance(self.bound, tuple) else f"{self.bound:g}"
        return f"zipvl-tau{self.tau:g}-bound{bound}"

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"method": self.name, **asdict(self)}

    def calibrated(self, layers: list[tuple[float, float]]) -> ZipVL:
        """With bounds of a mean and one deviation of every layer's (mean, deviation)."""
        return dataclasses.replace(self, bound=tuple(min(1.0, mean + deviation) for mean, deviation in layers))

    def shares(self, layers: int) -> tuple[float, ...]:
        """What each layer keeps at most. Raises ValueError where they are told for another number of layers."""
        told = self.bound if self.budgets is None else self.budgets
        shares = told if isinstance(told, tuple) else (told,) * layers
        if len(shares) != layers:
            raise ValueError(f"{len(shares)} layers were calibrated, the decoder has {layers}: calibrate this model")
        return shares

    def groups(self, dense: tuple[CacheGroup, ...], visual_tokens: int) -> tuple[CacheGroup, ...]:
        """A cache group a layer; ``visual_tokens`` of a conversation are cut to what the layer keeps at most."""
        if len(dense) != 1:
            raise GraphError(f"the decoder has {len(dense)} cache groups; zipvl splits one, of visual tokens and text")
        (whole,) = dense
        return tuple(
            dataclasses.replace(
                whole,
                layers=(layer,),
                capacity=whole.capacity - visual_tokens + most_features(visual_tokens, share),
                most=share,
                chooses=True,
            )
            for layer, share in zip(whole.layers, self.shares(len(whole.layers)), strict=True)
        )

    def __call__(self, model: ir.Model, visual_tokens: int = 0, grid: tuple[int, int] | None = None) -> ir.Model:
        """Insert the selection into every layer of a decoder graph, in place, and return it.

        Args:
            model: decoder with the boundary of :mod:`vlmtrim.graphs.contract`, one cache group, no selection yet.
            visual_tokens: visual tokens that a sequence of full length is assumed to hold; the caches shrink by what
                is removed of them at least. 0 leaves every capacity as it is.
            grid: of a picture's visual tokens; not needed here.
        """
        layers = anatomy.find_layers(model)
        capacity = split.common_capacity(layers)
        dense = CacheGroup(tuple(range(len(layers))), capacity, 1, 1)
        groups = self.groups((dense,), visual_tokens)
        keeping = layerwise.Layerwise(model, layers)
        probes = _Probes(keeping, self)
        for layer, group in zip(layers, groups, strict=True):
            keeping.rewrite(layer, probes.choose(layer, group.most), group.capacity)
        return keeping.finish()


class _Probes:
    """What layers are judged by; shapes: R probe rows, S tokens, N visual tokens, M of them that may stay."""

    def __init__(self, keeping: layerwise.Layerwise, method: ZipVL):
        self.keeping, self.method = keeping, method
        self.ops = ops = keeping.ops
        recent, spread = method.recent, method.spread
        most = ops.const([recent + spread])
        # A step without visual tokens has nothing to judge: no rows, no queries for them.
        count = ops("Min", keeping.tokens, most, ops("Mul", keeping.visual, most))
        number = ops("Range", ops.const(0), ops("Squeeze", count, ops.const([0])), ops.const(1))
        real = ops("Unsqueeze", ops("Add", keeping.last_index, ops.const([1])), ops.const([1]))  # [B, 1]
        rest = ops("Max", ops("Sub", real, ops.const([recent])), ops.const([spread]))
        strided = ops("Div", ops("Mul", number, rest), ops.const([max(spread, 1)]))
        ending = ops("Sub", ops("Add", number, rest), ops.const([spread]))
        row = ops("Where", ops("Less", number, ops.const([spread])), strided, ending)
        self.rows = ops("Min", row, ops("Sub", real, ops.const([1])))  # [B, R]
        token = ops("Range", ops.const(0), ops("Squeeze", keeping.tokens, ops.const([0])), ops.const(1))
        seen = ops("LessOrEqual", token, ops("Unsqueeze", self.rows, ops.const([2])))  # [B, R, S]
        limit = ops("Where", seen, ops.const(0.0, np.float32), ops.const(-np.inf, np.float32))
        self.limit = ops("Unsqueeze", limit, ops.const([1]))
        counted = ops("Cast", ops("Less", number, real), to=ir.DataType.FLOAT)  # [B, R]; a short row has fewer
        self.weights = ops("Unsqueeze", counted, ops.const([1, 2]))
        seen_by = ops("MatMul", ops("Unsqueeze", counted, ops.const([1])), ops("Cast", seen, to=ir.DataType.FLOAT))
        seen_by = ops("GatherElements", ops("Squeeze", seen_by, ops.const([1])), keeping.positions, axis=1)
        self.seen_by = ops("Max", seen_by, ops.const(1.0, np.float32))  # [B, N]
        total = ops("ReduceSum", counted, ops.const([1]), keepdims=1)
        self.spare = ops("Mul", total, ops.const(1.0 - method.tau, np.float32))
        last = ops("Equal", keeping.positions, ops("Unsqueeze", keeping.last_index, ops.const([1])))
        self.last = ops("Where", last, ops.const(np.inf, np.float32), ops.const(0.0, np.float32))
        any_last = ops("ReduceSum", ops("Cast", last, to=ir.DataType.INT64), ops.const([1]), keepdims=1)
        self.least = any_last  # [B, 1]

    def choose(self, layer: Layer, share: float) -> layerwise.Choice:
        """Which tokens of the step stay in a layer that keeps at most ``share`` of the visual ones."""
        ops, keeping = self.ops, self.keeping
        most = keeping.most(share)
        attention = self._attention(layer)
        paid = ops("GatherElements", attention, keeping.positions, axis=1)  # [B, N]
        ranking = ops("Add", ops("Div", paid, self.seen_by), self.last)
        ranked = select.top(ops, ranking, most, most_features(keeping.most_visual, share), largest=True)  # [B, M]
        if self.method.budgets is not None:
            return keeping.choice(ranked, None, most)
        order = select.top(ops, paid, keeping.visual, keeping.most_visual, largest=False)
        ascending = ops("GatherElements", paid, order, axis=1)
        given_up = ops("LessOrEqual", ops("CumSum", ascending, ops.const(1)), self.spare)
        gone = ops("ReduceSum", ops("Cast", given_up, to=ir.DataType.INT64), ops.const([1]), keepdims=1)
        wanted = ops("Max", ops("Sub", keeping.visual, gone), self.least)
        return keeping.choice(ranked, ops("Min", wanted, most), most)

    def _attention(self, layer: Layer) -> ir.Value:
        """Sum over the probe rows of the mean over heads, float32 [B, S]."""
        ops = self.ops
        query, keys = self.keeping.queries(layer, self.rows), self.keeping.new_key(layer)
        heads, kv_heads, size = attention.head_counts(layer)
        count = ops("Mul", ops.dim(self.rows, 1), ops.const([heads // kv_heads]))
        shape = ops.concat(self.keeping.batch, ops.const([kv_heads]), count, ops.const([size]))
        grouped = ops("Reshape", query, shape)
        logits = ops("MatMul", grouped, ops("Transpose", keys, perm=[0, 1, 3, 2]))
        shape = ops.concat(self.keeping.batch, ops.const([heads]), ops.dim(self.rows, 1), self.keeping.tokens)
        logits = ops("Cast", ops("Reshape", logits, shape), to=ir.DataType.FLOAT)
        if layer.scale != 1.0:
            logits = ops("Mul", logits, ops.const(layer.scale, np.float32))
        probabilities = ops("Softmax", ops("Add", logits, self.limit), axis=-1)
        summed = ops("MatMul", self.weights, probabilities)  # [B, H, 1, S]
        return ops("ReduceMean", summed, ops.const([1, 2]), keepdims=0)


METHOD = ZipVL
