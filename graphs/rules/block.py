"""FastV's score within cells of 2 x 2 tokens: first the best token of every cell, then the second best of each.

Ours. The attention of the last token gathers on few spots, and what is counted or compared lies elsewhere; taking
turns among cells keeps all of the picture represented, and inside a cell the attention chooses.
"""

from __future__ import annotations

from vlmtrim.graphs.later import ir, states
from vlmtrim.graphs.rules import ATTENTION, PLACES, Step, last_row

NEEDS = frozenset({ATTENTION, PLACES})
SIDE = 2


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    step.check_place("block", any_size=True)
    return turns(step, last_row.score(step), SIDE)


def turns(step: Step, attention: ir.Value, side: int) -> ir.Value:
    """``attention`` [B, N], at most 1, less how many tokens of a token's cell are ahead of it."""
    ops, first, second = step.ops, step.ops.const([1]), step.ops.const([2])
    cell, number = states.pooled(step, side), states.numbers(step)
    same = ops("Equal", ops("Unsqueeze", cell, first), ops("Unsqueeze", cell, second))  # [B, N, N]
    theirs, mine = ops("Unsqueeze", attention, first), ops("Unsqueeze", attention, second)
    earlier = ops("Less", number, ops("Unsqueeze", number, first))
    ahead = ops("Or", ops("Greater", theirs, mine), ops("And", ops("Equal", theirs, mine), earlier))
    rank = ops("ReduceSum", ops("Cast", ops("And", same, ahead), to=ir.DataType.FLOAT), second, keepdims=0)
    return ops("Sub", attention, rank)
