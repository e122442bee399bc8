"""One module a cache policy: what stays in the caches; the file's name, with dashes, is the policy's.

A policy is a frozen dataclass whose fields are flags of export-vlm (``--cache-<field>``), derived from :class:`Policy`;
its module names it POLICY. Its oracle is the file of the same name in ``vlmtrim.export.oracles.caches``. The graphs
that policies write are of :mod:`vlmtrim.graphs.keeping`; shapes and letters as there.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlmtrim.graphs.keeping import LAST, STAYS, VISUAL
from vlmtrim.graphs.later import ir
from vlmtrim.graphs.ops import Ops


@dataclass(frozen=True)
class Scoring:
    """What the entries of one layer are scored by, for R query rows, under the causal limit.

    Attributes:
        ops: collects the nodes.
        logits: float32 [B, H, R, W], scaled; very negative where a row does not see an entry.
        probabilities: their softmax.
        seen: bool [B, 1, R, W].
        weights: float32 [B, 1, R, 1], 0 for a row whose token the layer did not take.
        row_slots: int64 [B, R].
        kinds: int64 [B, W], of :mod:`vlmtrim.graphs.keeping`.
        keys: model [B, KV, W, Dh].
        heads, kv_heads: H and KV.
    """

    ops: Ops
    logits: ir.Value
    probabilities: ir.Value
    seen: ir.Value
    weights: ir.Value
    row_slots: ir.Value
    kinds: ir.Value
    keys: ir.Value
    heads: int
    kv_heads: int

    def received(self, attention: ir.Value) -> ir.Value:
        """Sum over the rows that count, [B, H, R, W] -> [B, H, W]."""
        return self.ops("ReduceSum", self.ops("Mul", attention, self.weights), self.ops.const([2]), keepdims=0)

    def by_layer(self, scores: ir.Value) -> ir.Value:
        """Mean over the query heads, [B, H, W] -> [B, 1, W]."""
        return self.ops("ReduceMean", scores, self.ops.const([1]), keepdims=1)

    def by_head(self, scores: ir.Value) -> ir.Value:
        """Mean over the query heads that share a key head, [B, H, W] -> [B, KV, W]."""
        ops = self.ops
        shape = ops.concat(
            ops.dim(scores, 0), ops.const([self.kv_heads, self.heads // self.kv_heads]), ops.dim(scores, 2)
        )
        return ops("ReduceMean", ops("Reshape", scores, shape), ops.const([2]), keepdims=0)


@dataclass(frozen=True)
class Budgeting:
    """What all layers decide by.

    Attributes:
        ops: collects the nodes.
        scores: float32 [L, B, Z, W].
        kinds: int64 [L, B, W].
        share: float32 [], of the candidates, that stays.
        candidates, stays: int64 [L, B], how many entries count for the share, and how many stay whatever they score.
        judged: int64 [L, B], how many entries are judged: the candidates, and what was said since the last round.
        sets: X.
        longest: W at most.
    """

    ops: Ops
    scores: ir.Value
    kinds: ir.Value
    share: ir.Value
    candidates: ir.Value
    stays: ir.Value
    judged: ir.Value
    sets: int
    longest: int

    def both(self) -> tuple[ir.Value, ir.Value]:
        """The two halves of ``scores``, of a policy with two maps a set: [L, B, X, W] each."""
        return self.ops("Split", self.scores, outputs=2, axis=2, num_outputs=2)

    def of_share(self, share: ir.Value) -> ir.Value:
        """int64 [L, B]: ``round(share * candidates)`` in float32, halves to even."""
        ops = self.ops
        count = ops("Mul", share, ops("Cast", self.candidates, to=ir.DataType.FLOAT))
        return ops("Cast", ops("Round", count), to=ir.DataType.INT64)

    def is_candidate(self) -> ir.Value:
        """float32 [L, B, 1, W], 1 for an entry that is judged."""
        ops = self.ops
        judged = ops("Cast", ops("Greater", self.kinds, ops.const(STAYS)), to=ir.DataType.FLOAT)
        return ops("Unsqueeze", judged, ops.const([2]))

    def newest(self, count: ir.Value) -> ir.Value:
        """bool [L, B, 1, W]: the last ``count`` (int64 [L, B, 1] or []) of the entries that are judged."""
        ops = self.ops
        judged = ops("Cast", ops("Greater", self.kinds, ops.const(STAYS)), to=ir.DataType.INT64)
        left = ops("Sub", ops("Unsqueeze", self.judged, ops.const([2])), ops("CumSum", judged, ops.const(2)))
        recent = ops("And", ops("Less", left, count), ops("Cast", judged, to=ir.DataType.BOOL))
        return ops("Unsqueeze", recent, ops.const([2]))


@dataclass(frozen=True)
class Policy:
    """What stays of the candidates in every layer: as many of highest score as ``--cache-share`` says.

    A policy changes what is different about it: which rows score (``rows``, ``count``, ``part``), by what
    (:meth:`score`), how many stay (:meth:`counts`) and in which order they are ranked (:meth:`ranking`).
    """

    name: ClassVar[str]
    rows: ClassVar[str] = LAST
    part: ClassVar[float] = 1.0
    by_head: ClassVar[bool] = False  # every key head keeps entries of its own, as many as the others of its layer
    by_layer: ClassVar[bool] = False  # layers keep different numbers of entries, and so are cache groups of their own
    candidates: ClassVar[str] = VISUAL
    accumulates: ClassVar[bool] = False  # scores of all steps are summed, while an answer grows

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the noise, at the first step, and what every later one adds."""
        return 1.0, 0.0

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return 1

    @property
    def merges(self) -> bool:
        """Whether what goes is averaged into what stays."""
        return False

    @property
    def interval(self) -> int:
        """Decode steps between two rounds while an answer grows; 0 where only a step with pictures has one."""
        return 0

    @property
    def ring(self) -> int:
        """Entries at the end of a question in which the answer goes round; 0 where it grows."""
        return 0

    @property
    def noise(self) -> int | None:
        """Seed of the noise that scores take; None where they take none."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the contract records."""
        return {"policy": self.name, **asdict(self)}

    def maps(self, kv_heads: int) -> int:
        """Z, maps of scores."""
        return self.sets(kv_heads)

    def sets(self, kv_heads: int) -> int:
        """X, sets of entries in a layer."""
        return kv_heads if self.by_head else 1

    def score(self, scoring: Scoring) -> ir.Value:
        """float32 [B, Z, W]: what the entries of one layer are ranked by."""
        received = scoring.received(scoring.probabilities)
        return scoring.by_head(received) if self.by_head else scoring.by_layer(received)

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]: how many candidates stay."""
        return budget.of_share(budget.share)

    def ranking(self, budget: Budgeting, counts: ir.Value) -> ir.Value:
        """float32 [L, B, X, W]: the candidates of highest value stay, ties: lowest slot first."""
        return budget.scores


def flag(default: Any, help: str, **settings: Any) -> Any:
    """A field of a policy that is a flag of export-vlm; ``settings`` as argparse takes them, e.g. ``choices``."""
    kind = {} if default is None or isinstance(default, bool) else {"type": type(default)}
    kind = {"action": "store_true"} if isinstance(default, bool) else kind
    return dataclasses.field(default=default, metadata={**kind, "help": help, **settings})


def policy_names() -> list[str]:
    """Names of the policies, from the files there are; nothing is imported."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[!_]*.py"))


def load_policy(name: str) -> Any:
    """The class of a policy in :func:`policy_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").POLICY


def fields_of(policy: Any) -> dict[str, dict[str, Any]]:
    """Names of a policy's flags, each with its settings for argparse."""
    return {field.name: dict(field.metadata) for field in dataclasses.fields(policy) if field.metadata}


def float_const(ops: Ops, value: Any) -> ir.Value:
    """A float32 constant."""
    return ops.const(value, np.float32)
