"""Qwen2-VL: as Qwen2.5-VL, without attention windows, and with frames one position apart whatever their distance."""

from __future__ import annotations

import numpy as np

from vlmtrim.runtime.processors import qwen2_5_vl


class Processor(qwen2_5_vl.Processor):
    """Inputs and grids as in :mod:`vlmtrim.runtime.processors.qwen2_5_vl`."""

    def _interval(self, fps: float) -> np.float32:
        return np.float32(1)
