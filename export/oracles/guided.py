"""SGL's large model a second time (arXiv 2412.03324): FastV's selection where the ranking is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtrim.export.oracles import fastv
from vlmtrim.export.oracles.rules import Seen


class Oracle(fastv.Oracle):
    """``selection``: ``k`` and ``r``; ``guide`` [N] ranks the visual tokens of the turn that is run next."""

    def __init__(self, selection: Mapping[str, Any]):
        super().__init__({**selection, "seed": 0, "score": "stride"})
        self.guide = torch.zeros(0)
        self._rule = self

    def rank(self, seen: Seen, visual: Tensor, count: int, seed: int) -> tuple[list[int], Tensor]:
        """As the rules do; a step without visual tokens ranks none."""
        return [], self.guide if len(visual) else torch.zeros(0)
