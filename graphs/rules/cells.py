"""The last token's attention, cell by cell: the best token of every cell first, then the second best of each.

Ours; recommended. Cells are squares of 2 x 2 tokens, of 3 x 3 from r = 0.89 on and so forth: the largest of which there
are at least as many as tokens stay, but for r below 0.75. The attention of the last token gathers on few spots, and
what is to be counted or compared lies elsewhere, too. Taking turns among cells keeps the whole picture represented, as
a stride does; which token stands for its cell is left to the attention. No score is learnt and nothing but r sets it.
"""

from __future__ import annotations

import math

from vlmtrim.graphs.later import ir, states
from vlmtrim.graphs.rules import ATTENTION, PLACES, Step, last_row

NEEDS = frozenset({ATTENTION, PLACES})


def side(removed: float) -> int:
    """Tokens along a cell's side where the share ``removed`` goes."""
    return max(2, math.floor((1 - removed) ** -0.5 + 1e-9))


def score(step: Step) -> ir.Value:
    """float32 [B, N]: the attention, at most 1, less the number of tokens of its cell that are ahead of a token."""
    step.check_place("cells", any_size=True)
    ops, first, second = step.ops, step.ops.const([1]), step.ops.const([2])
    attention, number = last_row.score(step), states.numbers(step)
    cell = states.cells(step, side(step.sizes.removed))
    same = ops("Equal", ops("Unsqueeze", cell, first), ops("Unsqueeze", cell, second))  # [B, N, N]
    theirs, mine = ops("Unsqueeze", attention, first), ops("Unsqueeze", attention, second)
    earlier = ops("Less", number, ops("Unsqueeze", number, first))
    ahead = ops("Or", ops("Greater", theirs, mine), ops("And", ops("Equal", theirs, mine), earlier))
    rank = ops("ReduceSum", ops("Cast", ops("And", same, ahead), to=ir.DataType.FLOAT), second, keepdims=0)
    return ops("Sub", attention, rank)
