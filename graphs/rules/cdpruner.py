"""The picks of dpp with every token weighted by its relevance to the text: CDPruner (arXiv 2506.10967).

Relevance is the mean cosine of a token's embedding to those of the step's text, scaled to 0 .. 1 over the visual
tokens. The paper asks CLIP's text tower for LLaVA, which no bundle has, and the embeddings elsewhere.
"""

from __future__ import annotations

import numpy as np

from vlmtrim.graphs.later import ir, states
from vlmtrim.graphs.rules import Step, dpp

NEEDS: frozenset[str] = frozenset()
COST = "2 % of a prefill at 576 visual tokens, 24 % at 2,880"
_FAR = 1e9


def score(step: Step) -> ir.Value:
    """float32 [B, N]."""
    ops, one, second = step.ops, step.ops.const([1]), step.ops.const([2])
    features, number, none = states.with_none(step)
    text = ops("Unsqueeze", states.is_text(step), one)  # [B, 1, S]
    wanted = ops("MatMul", text, states.unit(ops, step.embeds))
    relevance = states.cosines(ops, wanted, features)  # [B, 1, N + 1], times the number of text tokens
    far = ops("Mul", none, ops.const(_FAR, np.float32))
    low = ops("ReduceMin", ops("Add", relevance, far), second, keepdims=1)
    high = ops("ReduceMax", ops("Sub", relevance, far), second, keepdims=1)
    span = ops("Max", ops("Sub", high, low), ops.const(1e-12, np.float32))
    relevance = ops("Div", ops("Sub", relevance, low), span)
    relevance = ops("Mul", relevance, ops("Sub", ops.const(1.0, np.float32), none))
    kernel = ops("Mul", states.cosines(ops, features, features), relevance)
    return dpp.picks(step, ops("Mul", kernel, ops("Transpose", relevance, perm=[0, 2, 1])), number, none)
