"""What rules read of the tokens' embeddings and of their places on the picture.

Shapes: B rows, S tokens of this step, N visual tokens, D hidden width.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.ops import Ops
from vlmtrim.graphs.rules import Step
from vlmtrim.graphs.surgery.select import gather_tokens

_WIDEST = 1 << 20  # more than any row or column number


def unit(ops: Ops, states: ir.Value) -> ir.Value:
    """States [.., D] in float32, each of length 1."""
    states = ops("Cast", states, to=ir.DataType.FLOAT)
    squares = ops("ReduceSum", ops("Mul", states, states), ops.const([2]), keepdims=1)
    return ops("Div", states, ops("Sqrt", ops("Max", squares, ops.const(1e-24, np.float32))))


def unit_visual(step: Step) -> ir.Value:
    """Embeddings of the visual tokens in float32, each of length 1: [B, N, D]."""
    return unit(step.ops, gather_tokens(step.ops, step.embeds, step.visual_positions))


def cosines(ops: Ops, one: ir.Value, other: ir.Value) -> ir.Value:
    """Of unit states [B, n, D] and [B, m, D]: [B, n, m]."""
    return ops("MatMul", one, ops("Transpose", other, perm=[0, 2, 1]))


def with_none(step: Step) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(embeddings of the visual tokens of length 1, and zeros as one more: float32 [B, N + 1, D], int64 0 .. N, and 1.0
    for what is no token: float32 [N + 1]). Picks from none must build, too: a step of text has no visual token."""
    ops = step.ops
    features = unit_visual(step)
    shape = ops.concat(step.sizes.batch, ops.const([1]), ops.dim(features, 2))
    features = ops("Concat", features, ops("Expand", ops.const(0.0, np.float32), shape), axis=1)
    end = ops("Squeeze", step.sizes.visual, ops.const([0]))
    number = ops("Range", ops.const(0), ops("Add", end, ops.const(1)), ops.const(1))
    return features, number, ops("Cast", ops("Equal", number, end), to=ir.DataType.FLOAT)


def without_none(step: Step, scores: ir.Value) -> ir.Value:
    """[B, 1, N + 1] -> [B, N]."""
    ops = step.ops
    return ops("Squeeze", ops.slice(scores, ops.const([0]), step.sizes.visual, axis=2), ops.const([1]))


def numbers(step: Step) -> ir.Value:
    """0 .. N-1, int64 [N]."""
    ops = step.ops
    return ops("Range", ops.const(0), ops("Squeeze", step.sizes.visual, ops.const([0])), ops.const(1))


def is_text(step: Step) -> ir.Value:
    """1.0 for real tokens that are not visual, float32 [B, S]."""
    ops = step.ops
    token = ops("Range", ops.const(0), ops("Squeeze", step.sizes.tokens, ops.const([0])), ops.const(1))
    real = ops("LessOrEqual", token, ops("Unsqueeze", step.last_index, ops.const([1])))
    none = ops("Expand", ops.const(0.0, np.float32), ops("Shape", step.visual_positions))
    return ops("ScatterElements", ops("Cast", real, to=ir.DataType.FLOAT), step.visual_positions, none, axis=1)


def cells(step: Step, side: int) -> ir.Value:
    """The cell of ``side`` x ``side`` places that each visual token lies in, a number of its own: int64 [B, N]."""
    ops = step.ops
    if step.grid is not None:
        rows, columns = step.grid
        across = -(-columns // side)
        cell = [row // side * across + column // side for row in range(rows) for column in range(columns)]
        number = np.arange(step.sizes.most_visual)
        picture, place = np.divmod(number, rows * columns)
        table = picture * across * -(-rows // side) + np.array(cell)[place]
        row = ops("Slice", ops.const(table), ops.const([0]), step.sizes.visual, ops.const([0]))
        return ops("Expand", row, ops("Shape", step.visual_positions))
    assert step.position_ids is not None
    index = ops("Expand", step.visual_positions, ops.concat(ops.const([3]), ops("Shape", step.visual_positions)))
    places = ops("GatherElements", step.position_ids, index, axis=2)  # [3, B, N]: time, row, column
    # Counted from the first visual token, so that cells do not depend on the text before; nothing where N = 0.
    places = ops("Sub", places, ops.slice(places, ops.const([0]), ops.const([1]), axis=2))
    places = ops("Add", places, ops.const(side * _WIDEST // 2))  # later rows may begin left of the first
    time, row, column = ops("Split", places, outputs=3, axis=0, num_outputs=3)
    row, column = ops("Div", row, ops.const([side])), ops("Div", column, ops.const([side]))
    cell = ops("Add", ops("Mul", row, ops.const([_WIDEST])), column)
    return ops("Squeeze", ops("Add", ops("Mul", time, ops.const([_WIDEST**2])), cell), ops.const([0]))
