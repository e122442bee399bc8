"""GPTQ: weights rounded one input after the other, each error made up for by the inputs that are still to come.

Frantar et al. 2023, "GPTQ: Accurate post-training quantization for generative pre-trained transformers", algorithm 1,
with scales found when their block is reached, and symmetric integers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmtrim.graphs.formats import CHANNEL
from vlmtrim.graphs.formats.scales import symmetric

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it (the paper's)
STEP = 128  # inputs between two updates of all the rest, where one block is all of them


def gptq(
    matrix: Tensor, hessian: Tensor, block: int, dtype: str, low: int, high: int, shrink: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of a matrix such that its outputs on the inputs seen change little.

    Args:
        matrix: float32 [K, N]; overwritten by what the integers stand for.
        hessian: float32 [K, K], the sum of x x^T over the inputs seen; overwritten.
        block: inputs that share a scale, or CHANNEL.
        dtype, low, high, shrink: as :func:`vlmtrim.graphs.formats.scales.symmetric` takes them.

    Returns:
        (int8 [K, N], scales [K / block, N], or [N] for CHANNEL).
    """
    inputs = matrix.shape[0]
    importance = hessian.diagonal().clone()
    factor = _factor(hessian)
    codes = np.empty(tuple(matrix.shape), np.int8)
    length = inputs if block == CHANNEL else block
    step = min(STEP, length)
    scales, steps = [], torch.empty(0)
    for start in range(0, inputs, step):
        if start % length == 0:
            part = slice(start, start + length)
            _, found = symmetric(
                matrix[part].numpy(), CHANNEL, dtype, low, high, shrink, importance[part].clamp_min(1e-12).numpy()
            )
            scales.append(found)
            steps = torch.from_numpy(found.astype(np.float32))
        end = min(start + step, inputs)
        errors = torch.empty(end - start, matrix.shape[1])
        for row in range(start, end):
            code = (matrix[row] / steps).round_().clamp_(low, high)
            codes[row] = code.to(torch.int8).numpy()
            near = code * steps
            errors[row - start] = (matrix[row] - near) / factor[row, row]
            matrix[row] = near
            if row + 1 < end:
                matrix[row + 1 : end] -= factor[row, row + 1 : end, None] * errors[row - start]
        matrix[end:] -= factor[start:end, end:].t() @ errors
    return codes, scales[0] if block == CHANNEL else np.stack(scales)


def _factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped Hessian, [K, K]; its memory is used."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that never came
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)
