"""One bundle guided by another: A Stitch in Time, SGL (arXiv 2412.03324)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtrim.graphs.contract import BUNDLE, Contract


def drawn_scores(contract: Contract, rows: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Scores for a bundle that is run without its guide, to check or to time it: float32 [B, N], the same every time.

    Args:
        contract: None is returned where it takes none.
        rows: token ids, image tokens already repeated.
    """
    if contract.guide != BUNDLE:
        return None
    visual = [list(row).count(contract.image_token_id) for row in rows]
    random = np.random.default_rng(visual)
    return np.stack([random.random(count, dtype=np.float32) for count in visual])
