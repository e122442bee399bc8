"""What parts of a stranger's graph compute, found by running them: exporters write a mask in a hundred ways.

What depends on no weights and on no states of tokens is worked out (:mod:`.evaluator`) for steps of made-up sizes, and
then only its numbers count. B rows, S tokens, P entries of the caches before them, T = P + S.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.foreign.boundary import Boundary, Cache
from vlmtrim.graphs.foreign.evaluator import Evaluator
from vlmtrim.graphs.foreign.nodes import followed, kind, said, size
from vlmtrim.graphs.ops import Ops

HIDDEN = -1e4  # what is added to logits of tokens that are not seen, or less
SAME = 1e-3  # a factor of one, rounded
LAID_OUT = frozenset({"Identity", "Cast", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Transpose", "Tile"})


class Trial(Evaluator):
    """One step: ``real`` bool [B, T] says which tokens are no padding; ``past`` is P; a token is to see the last
    ``window`` entries, itself among them, or all where that is 0."""

    depends_on = "masks, lengths and constants"

    def __init__(self, model: ir.Model, boundary: Boundary, real: np.ndarray, past: int, window: int = 0):
        super().__init__(model)
        self.real, self.past, self.tokens, self.window = real, past, real.shape[1] - past, window
        rows, total = real.shape
        self._named(boundary.tokens, [rows, self.tokens, size(boundary.tokens, 2) or 1])
        for cache in boundary.caches:
            for value in (cache.key, cache.value):
                self._named(value, [rows, size(value, 1) or 1, past, size(value, 3) or 1])
        for value, shape in ((boundary.mask, [rows, total]), (boundary.positions, [rows, self.tokens])):
            if value is None or value.dtype is None:
                continue
            given = [*[3] * (len(value.shape or ()) - 2), *shape]
            # Positions by chance: whatever sees the right tokens does not go by them.
            at = np.random.default_rng(0).integers(0, 48, given)
            self.give(value, (real if value is boundary.mask else at).astype(value.dtype.numpy()))

    @property
    def seen(self) -> np.ndarray:
        """Which tokens causal attention sees, bool [B, 1, S, T]."""
        entry, own = np.arange(self.real.shape[1]), self.past + np.arange(self.tokens)[:, None]
        causal = (entry <= own) & (entry > own - (self.window or self.real.shape[1]))
        return (causal & self.real[:, None])[:, None]

    def asks(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which of logits of that shape [B, .., S, T] belong to queries of real tokens: bool."""
        return np.broadcast_to(self.real[:, None, self.past :, None], shape)


def trials(model: ir.Model, boundary: Boundary, capacity: int, window: int = 0) -> tuple[Trial, ...]:
    """Steps that tell causal attention from all others: a row with padding behind a past, a prompt without one, and a
    step at the end of caches of ``capacity`` tokens, where a window shows. Padding is on the right, as in a bundle."""
    short = np.ones((2, 8), bool)
    short[1, 6:] = False
    last = np.ones((3, max(capacity, 2)), bool)
    return (
        Trial(model, boundary, short, 3, window),
        Trial(model, boundary, short, 0, window),
        Trial(model, boundary, last, last.shape[1] - 1, window),
    )


def sizes_off_tokens(ops: Ops, steps: tuple[Trial, ...], tokens: ir.Value, joined: list[ir.Value]) -> None:
    """Let what reads sizes off all keys or values [B, KV, T, Dh], in any layout, read them off the tokens, as far as
    they are those of rows, tokens, or fixed: behind caches of fixed size they have no such thing."""
    found = {value: sizes for one in joined for value, sizes in _sizes_read(steps, one)}
    for value, sizes in found.items():
        if all(np.array_equal(size, sizes[0]) for size in sizes):
            new = ops.const(sizes[0])
        else:
            rows = [size.item() for size in sizes] == [step.real.shape[0] for step in steps]
            new = ops.dim(tokens, 0 if rows else 1)
            new = new if sizes[0].ndim else ops("Squeeze", new, ops.const([0]))
        new.type, new.shape = value.type, value.shape
        value.replace_all_uses_with(new)


def _sizes_read(steps: tuple[Trial, ...], joined: ir.Value) -> Iterator[tuple[ir.Value, list[np.ndarray]]]:
    """What is gathered of shapes of ``joined``, with its numbers in each step, as far as tokens have them too."""
    heads, width = (size(joined, axis) or 1 for axis in (1, 3))
    shapes = [node for node, _ in followed(joined, LAID_OUT) if node.op_type == "Shape"]
    for node in [node for shape in shapes for node, _ in shape.outputs[0].uses() if kind(node) == ("", "Gather")]:
        given = [np.zeros((step.real.shape[0], heads, step.real.shape[1], width), np.float32) for step in steps]
        try:
            found = [step.of(said(node), node.outputs[0], {joined: a}) for step, a in zip(steps, given, strict=True)]
        except GraphError:
            continue
        if all(np.array_equal(one, found[0]) for one in found) or [one.tolist() for one in found] in (
            [np.full(found[0].shape, step.real.shape[0]).tolist() for step in steps],
            [np.full(found[0].shape, step.tokens).tolist() for step in steps],
        ):
            yield node.outputs[0], found


def factor(
    trial: Trial, where: str, value: ir.Value | None, read: ir.Value, states: np.ndarray, want: np.ndarray
) -> float:
    """The number that ``value`` is times ``want`` where ``read`` holds ``states``. Raises GraphError without one."""
    found = trial.of(where, value, {read: states})
    at = np.unravel_index(np.argmax(np.abs(want)), want.shape)
    if found.shape == want.shape:
        times = float(found[at]) / float(want[at])
        if times and _close(found, times * want.astype(np.float64), states.dtype):
            return times
    raise GraphError(
        f"{where}: expected {value and value.name} to be {read.name}, by head and times a number; found another value "
        f"of shape {list(found.shape)}"
    )


def by_query_head(
    trial: Trial, where: str, value: ir.Value | None, cache: Cache, joined: ir.Value, turned: bool
) -> tuple[int, float]:
    """(H, the factor) of an operand of attention, [B, H, T, Dh] or ``turned`` [B, H, Dh, T], that repeats the heads of
    all keys or values ``joined`` [B, KV, T, Dh]. Raises GraphError where it is something else."""
    heads, width = size(cache.key, 1), size(joined, 3) or size(cache.key, 3)
    if not heads or not width or joined.dtype is None:
        raise GraphError(f"{where}: expected {cache.key.name} of fixed heads and head size; found {cache.key.shape}")
    shape = (trial.real.shape[0], heads, trial.real.shape[1], width)
    states = np.random.default_rng(1).normal(size=shape).astype(joined.dtype.numpy())
    found = trial.of(where, value, {joined: states})
    groups = found.shape[1] // heads if found.ndim == 4 and found.shape[1] % heads == 0 else 1
    want = np.repeat(states, max(1, groups), axis=1)
    return heads * groups, factor(trial, where, value, joined, states, want.swapaxes(2, 3) if turned else want)


def check_fits(where: str, mask: np.ndarray, want: np.ndarray) -> None:
    """Raise GraphError where a mask does not broadcast with what it is compared with."""
    pairs = zip(reversed(mask.shape), reversed(want.shape), strict=False)
    if mask.ndim > 4 or any(1 not in pair and pair[0] != pair[1] for pair in pairs):
        raise GraphError(f"{where}: expected a mask that broadcasts to [B, H, S, T]; found shape {list(mask.shape)}")


def check_causal(trial: Trial, where: str, seen: np.ndarray) -> None:
    """Raise GraphError where bool ``seen``, that broadcasts to [B, H, S, T], is not what causal attention sees."""
    want = trial.seen
    check_fits(where, seen, want)
    found = np.broadcast_to(seen, np.broadcast_shapes(seen.shape, want.shape))
    wrong = (found != want) & trial.asks(found.shape)
    if not wrong.any():
        return
    row, head, token, entry = (int(index) for index in np.argwhere(wrong)[0])
    does = "sees" if found[row, head, token, entry] else "does not see"
    all_ = f"the last {trial.window} tokens, as in the checkpoint," if trial.window else "all tokens"
    raise GraphError(
        f"{where}: expected causal attention to {all_} but padding; found that token {token} of a step behind "
        f"{trial.past} others {does} token {entry}: windows that the checkpoint has not, and other masks, have no such "
        "form"
    )


def softened(trial: Trial, where: str, logits: ir.Value | None, product: ir.Value, heads: int) -> float:
    """The factor between a product of queries with keys and logits, whose others are masked as causal attention has it.

    Raises GraphError where logits are something else: capped, biased, of a window.
    """
    if product.dtype is None:
        raise GraphError(f"{where}: expected products of queries and keys of a known type; found none")
    shape = (trial.real.shape[0], heads, trial.tokens, trial.real.shape[1])
    given = np.random.default_rng(2).normal(size=shape).astype(product.dtype.numpy())
    found = trial.of(where, logits, {product: given}).astype(np.float64)
    if found.shape != given.shape:
        raise GraphError(f"{where}: expected logits [B, H, S, T]; found shape {list(found.shape)}")
    check_causal(trial, where, found > HIDDEN)
    counted = np.broadcast_to(trial.seen, shape) & trial.asks(shape)
    have, want = found[counted], given[counted].astype(np.float64)
    best = np.argmax(np.abs(want))
    times = have[best] / want[best]
    if not _close(have, times * want, given.dtype):
        raise GraphError(
            f"{where}: expected logits to be products times a number; found {said(logits and logits.producer())} "
            "behind something else, such as a cap or a bias by place"
        )
    return float(times)


def check_passed_on(trial: Trial, where: str, value: ir.Value | None, weights: ir.Value, heads: int) -> None:
    """Raise GraphError where ``value`` is not the probabilities ``weights`` [B, H, S, T]."""
    shape = (trial.real.shape[0], heads, trial.tokens, trial.real.shape[1])
    dtype = np.dtype(np.float32) if weights.dtype is None else weights.dtype.numpy()
    given = np.random.default_rng(3).uniform(size=shape).astype(dtype)
    if abs(factor(trial, where, value, weights, given, given) - 1) > SAME:
        raise GraphError(f"{where}: expected its probabilities to weight values as they are; found a factor")


def _close(found: np.ndarray, want: np.ndarray, dtype: np.dtype) -> bool:
    """Equal but for the rounding of a few operations in ``dtype``."""
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-4
    return bool(np.allclose(found.astype(np.float64), want, rtol=0, atol=tolerance * np.abs(want).max()))
