"""Optimal transport from a layer's input to its output: TopV (arXiv 2503.18278), without its recovery.

Sources are the visual tokens' states that enter layer k-1, targets their states behind the norm that follows its
attention; cost = |s - t|^2 + 1 - exp(-d^2 / 2 sigma^2) + gamma x distance of s from the picture's middle, with d the
distance of their places. Three rounds of Sinkhorn; a token's score is its row sum. The paper leaves open: states of
length 1, eps 0.1, sigma 0.25 of the picture's side and marginals by norms are ours; gamma 0.01 is its LLaVA's.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.later import anatomy, ir, region, select, states
from vlmtrim.graphs.rules import ATTENTION, GRID, Step

NEEDS = frozenset({ATTENTION, GRID})
EPSILON, SIGMA, GAMMA, ROUNDS = 0.1, 0.25, 0.01, 3
_TINY = 1e-30


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    step.check_place("topv", any_size=False)
    ops, first, second = step.ops, step.ops.const([1]), step.ops.const([2])
    sources, targets = (select.gather_tokens(ops, value, step.visual_positions) for value in _states(step))
    cosines = states.cosines(ops, states.unit(ops, sources), states.unit(ops, targets))
    apart = ops("Sub", ops.const(2.0, np.float32), ops("Mul", cosines, ops.const(2.0, np.float32)))
    cost = ops("Add", apart, _of_places(step))
    kernel = ops("Exp", ops("Div", cost, ops.const(-EPSILON, np.float32)))  # [B, N, N]
    rows, columns = (_marginal(step, value) for value in (sources, targets))  # [B, N, 1] and [B, 1, N]
    columns = ops("Transpose", columns, perm=[0, 2, 1])
    tiny = ops.const(_TINY, np.float32)
    other = ops("Add", ops("Mul", columns, ops.const(0.0, np.float32)), ops.const(1.0, np.float32))
    own = rows
    for _ in range(ROUNDS):
        own = ops("Div", rows, ops("Add", ops("ReduceSum", ops("Mul", kernel, other), second, keepdims=1), tiny))
        other = ops("Div", columns, ops("Add", ops("ReduceSum", ops("Mul", kernel, own), first, keepdims=1), tiny))
    plan = ops("Mul", own, ops("ReduceSum", ops("Mul", kernel, other), second, keepdims=1))
    return ops("Squeeze", plan, second)


def _states(step: Step) -> tuple[ir.Value, ir.Value]:
    """What enters layer k-1, and what the norm behind its attention returns: [B, S, D] each."""
    model, layer = step.own_model("topv"), step.layer
    entering = step.embeds
    if layer.index:
        entering = anatomy.seam_before(model, anatomy.find_layers(model), layer.index)
    behind = region.downstream(layer.attention.outputs[0]) & region.upstream(step.seam)
    norm = next((node for node in model.graph if node in behind and node.op_type == "RMSNormalization"), None)
    if norm is None:
        raise GraphError(f"no RMSNormalization follows the attention of layer {layer.index}; choose another score")
    return entering, norm.outputs[0]


def _marginal(step: Step, values: ir.Value) -> ir.Value:
    """Norms of states [B, N, D] as shares of 1: [B, N, 1]."""
    ops = step.ops
    values = ops("Cast", values, to=ir.DataType.FLOAT)
    norms = ops("Sqrt", ops("ReduceSum", ops("Mul", values, values), ops.const([2]), keepdims=1))
    total = ops("ReduceSum", norms, ops.const([1]), keepdims=1)
    return ops("Div", norms, ops("Add", total, ops.const(_TINY, np.float32)))


def _of_places(step: Step) -> ir.Value:
    """The part of the cost that places alone decide, [N, N]."""
    ops, one = step.ops, step.ops.const([1])
    assert step.grid is not None
    rows, columns = step.grid
    place = np.arange(step.sizes.most_visual) % (rows * columns)
    across = np.stack([(place // columns + 0.5) / rows, (place % columns + 0.5) / columns], axis=1)  # of the side
    middle = GAMMA * np.linalg.norm(across - 0.5, axis=1)
    row, column, middle = (
        ops.slice(ops.const(values, np.float32), ops.const([0]), step.sizes.visual, axis=0)
        for values in (across[:, 0], across[:, 1], middle)
    )
    squares = []
    for values in (row, column):
        gap = ops("Sub", ops("Unsqueeze", values, one), values)
        squares.append(ops("Mul", gap, gap))
    near = ops("Exp", ops("Div", ops("Add", *squares), ops.const(-2 * SIGMA**2, np.float32)))
    return ops("Add", ops("Sub", ops.const(1.0, np.float32), near), ops("Unsqueeze", middle, one))
