"""What a bundle does to its caches: the record of its policy, and the boundary of the policy's graphs.

Three graphs without weights, run after a step that brought visual tokens (and while an answer grows, where the policy
asks for it). H query heads, KV key heads, Dh head size, X sets of entries in a layer (1, or KV where every key head
keeps its own), Z maps of scores (X, or more where a policy ranks by several).

    ===========  ==============================  ======================  =======  ======================================
    graph        tensor                          shape                   dtype    meaning
    ===========  ==============================  ======================  =======  ======================================
    decoder      in  score_rows                  [B, R]                  int64    tokens of S whose queries are returned
                 out score_queries.L             [B, H, R, Dh]           model    they, scaled; R = 0 costs nothing
                 in  query_limits.g              [B]                     int64    last slot that the step's first token
                                                                                  sees, where answers go round; else it
                                                                                  is write_indices.g
    score        in  score_queries               [B, H, R, Dh]           model    of one layer
                 in  row_slots                   [B, R]                  int64    where their tokens are in its caches;
                                                                                  -1: it did not take them
                 in  key_kinds                   [B, W]                  int64    NO_ENTRY, STAYS, CANDIDATE, FRESH
                 in  key_noise, temperature      [B, W], []              float32  where the policy is drawn
                 in  past_key_values.key         [B, KV, C, Dh]          model    its key cache
                 out key_scores                  [B, Z, W]               float32
    policy       in  key_scores                  [L, B, Z, W]            float32  of all layers
                 in  key_kinds                   [L, B, W]               int64
                 in  share                       []                      float32  of the candidates, that stays
                 out order                       [L, B, X, W]            int64    slots, what stays first, ascending
                 out counts                      [L, B]                  int64    how many stay
    compact-I    in  order                       [B, X, M]               int64    of one layer, its first M
                 in  counts, key_kinds           [B], [B, W]             int64    where what goes is merged
                 in  past_key_values.key/.value  [B, KV, C_g, Dh]        model
                 out present.key/.value          [B, KV, C_g, Dh]        model    bind to the buffers of the inputs
    ===========  ==============================  ======================  =======  ======================================

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from vlmtrim.graphs.schema import Among, Range

# In key_kinds: no entry (yet); one that stays whatever it scores; one that is judged; and one that is judged with them
# and adds nothing to what may stay: said since the last round, where caches are to hold as many as before.
NO_ENTRY, STAYS, CANDIDATE, FRESH = -1, 0, 1, 2
# Which tokens of a step are rows: the last ones; the last ones behind the last visual token; some at a uniform stride.
LAST, TEXT, PROBE = "last", "text", "probe"
# What is judged: the visual tokens of a step; what was said since the question; all entries.
VISUAL, SAID, ALL = "visual", "said", "all"
SCORE, POLICY, COMPACT = "score", "policy", "compact"


@dataclass(frozen=True)
class CachePolicy:
    """What stays in the caches, as the contract records it.

    Attributes:
        policy: its name and its parameters. For people and reports only.
        rows: which tokens of a step are rows, LAST, TEXT or PROBE.
        count: how many of them at most.
        part: share of the step's tokens that LAST takes at most.
        share: what stays of the candidates unless another is asked for.
        candidates: VISUAL, SAID or ALL.
        every: decode steps between two rounds while an answer grows; 0: none, only the step with pictures counts.
        accumulates: whether the scores of all steps are summed; else those of the round's own step count.
        ring: entries at the end of a question in which the answer goes round, a word taking the place of the oldest of
            them; 0: it grows.
        seed: of the noise that scores take; None where they take none.
        temperatures: the noise's temperature at the first step, and what every later one adds to it.
        compacts: of every cache group, the name of the graph that compacts its layers.
    """

    policy: Mapping[str, Any]
    rows: Annotated[str, Among((LAST, TEXT, PROBE))]
    count: Annotated[int, Range(0, 2**31 - 1)]
    share: Annotated[float, Range(0, 1)]
    compacts: tuple[str, ...]
    part: Annotated[float, Range(0, 1)] = 1.0
    candidates: Annotated[str, Among((VISUAL, SAID, ALL))] = VISUAL
    every: Annotated[int, Range(0, 2**31 - 1)] = 0
    accumulates: bool = False
    ring: Annotated[int, Range(0, 2**31 - 1)] = 0
    seed: Annotated[int, Range(0, 2**31 - 1)] | None = None
    temperatures: tuple[Annotated[float, Range(0, 1e6)], Annotated[float, Range(0, 1e6)]] = (1.0, 0.0)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of its graphs."""
        return (SCORE, POLICY, *dict.fromkeys(self.compacts))
