"""Which later tokens a step's tokens see: visual tokens that lie together attend to each other both ways."""

from __future__ import annotations

import numpy as np


def last_seen(tokens: int, visual_positions: np.ndarray) -> np.ndarray:
    """``last_seen`` of the contract, int64 [B, S].

    Args:
        tokens: of the longest row, S.
        visual_positions: int64 [B, N], ascending.
    """
    seen = np.tile(np.arange(tokens), (len(visual_positions), 1))
    if visual_positions.shape[1]:
        ends = np.full_like(visual_positions, tokens)
        ends[:, -1] = visual_positions[:, -1]
        is_end = visual_positions[:, 1:] > visual_positions[:, :-1] + 1
        ends[:, :-1] = np.where(is_end, visual_positions[:, :-1], tokens)
        ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # of the run, from its last token back
        np.put_along_axis(seen, visual_positions, ends, axis=1)
    return seen
