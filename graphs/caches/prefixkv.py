"""PrefixKV (arXiv 2412.03409, NeurIPS 2025): layers keep different shares, found ahead by one threshold for all."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from vlmtrim.graphs.caches import Budgeting, Policy, flag, float_const
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.keeping import PROBE
from vlmtrim.graphs.later import ir

GRID = 10  # the table has a row for every tenth of the share


def read_table(path: str | Path) -> tuple[tuple[float, ...], ...]:
    """Shares of the layers [GRID + 1, layers] of a file that ``--calibrate`` wrote. Raises ValueError."""
    try:
        rows = json.loads(Path(path).read_text())["shares"]
        table = tuple(tuple(float(share) for share in row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of shares as --calibrate writes it ({error!r})") from error
    if len(table) != GRID + 1 or len({len(row) for row in table}) != 1:
        raise ValueError(f"{path} has {len(table)} rows of shares; expected {GRID + 1} of one length")
    return table


def find_shares(samples: Sequence[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    """The table that scores ask for: for every tenth each layer's share, mean over the samples.

    A layer keeps its highest scores until they hold a share p of their sum; one p, found by bisection, makes all layers
    keep the tenth together.

    Args:
        samples: scores of the visual tokens of every layer, float [L, N].
    """
    tables = []
    for scores in samples:
        held = np.cumsum(-np.sort(-scores.astype(np.float64), axis=1), axis=1)
        held /= held[:, -1:]
        layers, count = held.shape
        rows = []
        for tenth in range(GRID + 1):
            low, high = 0.0, 1.0
            for _ in range(50):
                middle = (low + high) / 2
                enough = (held < middle).sum() >= layers * count * tenth / GRID
                low, high = (low, middle) if enough else (middle, high)
            rows.append((held < high).sum(axis=1) / count)
        rows[-1][:] = 1.0
        tables.append(rows)
    return tuple(tuple(row) for row in np.mean(tables, axis=0).round(6).tolist())


def _table(text: str) -> tuple[tuple[float, ...], ...]:
    try:
        return read_table(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class PrefixKV(Policy):
    """Every layer keeps a share of the visual tokens of its own, those that a probe of the rows attends to most.

    Score: sum over ``probe`` rows at a uniform stride, the last one among them (the paper: all rows), mean over heads.
    Shares: of pictures with questions (``--calibrate``) each layer's scores are sorted and summed up until one
    threshold, found by bisection, leaves the share wanted on average over the layers; between tenths they are
    interpolated. The paper's table is of the whole cache; here it is of the visual tokens, since text stays.

    Attributes:
        probe: rows in place of all rows.
        evict: the papers' eviction while an answer grows: every word takes the place of the entry so many before the
            end, so that the caches hold as many as after the question. 0: none. It gives up the question's own words
            and all but the last of the answer's, whatever they score.
        table: shares of the layers, a row for every tenth; None: all layers keep the same until they are calibrated.
    """

    probe: int = flag(32, "rows of the prompt, at a uniform stride, whose attention counts (32)")
    table: tuple[tuple[float, ...], ...] | None = flag(
        None, "shares of the layers, a file that --calibrate wrote (default: all the same)", type=_table, metavar="FILE"
    )
    evict: int = flag(0, "entries at the end in which an answer goes round, the papers' 25 (0: caches grow with it)")

    name: ClassVar[str] = "prefixkv"
    rows: ClassVar[str] = PROBE
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.probe < 1 or self.evict < 0:
            raise ValueError(f"probe is {self.probe}, evict {self.evict}: give 1 or more, and 0 or more")
        for row in self.table or ():
            if not all(0 <= share <= 1 for share in row):
                raise ValueError("table holds shares below 0 or above 1")

    @property
    def ring(self) -> int:
        """Entries at the end of a question in which the answer goes round; 0 where it grows."""
        return self.evict

    @property
    def count(self) -> int:
        """Rows that score, at most."""
        return self.probe

    def calibrated(self, samples: Sequence[np.ndarray]) -> PrefixKV:
        """With the table of :func:`find_shares`."""
        return dataclasses.replace(self, table=find_shares(samples))

    def counts(self, budget: Budgeting) -> ir.Value:
        """int64 [L, B]. Raises GraphError where the table is of another number of layers."""
        ops, layers = budget.ops, int((budget.scores.shape or ())[0])  # type: ignore[arg-type]
        if self.table is None:
            return super().counts(budget)
        if len(self.table[0]) != layers:
            raise GraphError(f"the table is of {len(self.table[0])} layers, the decoder has {layers}: calibrate it")
        place = ops("Mul", budget.share, float_const(ops, GRID))
        below = ops("Min", ops("Floor", place), float_const(ops, GRID - 1))
        index = ops("Cast", below, to=ir.DataType.INT64)
        rows = ops.const(np.array(self.table, np.float32), np.float32)
        low = ops("Gather", rows, index, axis=0)
        high = ops("Gather", rows, ops("Add", index, ops.const(1)), axis=0)
        shares = ops("Add", low, ops("Mul", ops("Sub", high, low), ops("Sub", place, below)))
        return budget.of_share(ops("Unsqueeze", shares, ops.const([1])))


POLICY = PrefixKV
