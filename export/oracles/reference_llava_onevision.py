"""LLaVA-OneVision in transformers as it is; the pictures of a turn are those of one prompt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmtrim.export.oracles import reference
from vlmtrim.runtime.measure.check import Turn


class Reference(reference.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.reference.Reference` has it."""

    def _inputs(self, turn: Turn) -> dict[str, Tensor]:
        together: Any = [list(turn.images)]  # a flat list would be one prompt each
        return dict(self._image_processor(together, return_tensors="pt"))
