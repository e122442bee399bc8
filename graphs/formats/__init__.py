"""How matrices are stored in fewer bits: one module a format; the file's name is the format's.

A format's module has

    BITS                bits of a weight, scales aside
    BLOCKS              lengths of a block along K, the default first; 0: a whole column
    ENGINES_ONLY        whether ONNX Runtime has no kernel that multiplies by it
    arrays(...)         what one matrix is stored as
    pack(...)           float32 [K, N] -> those arrays; what checkpoints alone bring (GIVEN) has none
    restore(...)        nodes that make the matrix of them again
    LIMITS, SHRINK      if it is of integers: theirs, and what shares of the largest magnitude scales are searched at;
                        ``from_codes`` stores integers that something else has rounded
    multiply(...)       in its place, or beside it: nodes that make the product, where that is no MatMul by what
                        ``restore`` gives

and its docstring's first line is its entry in help texts. A matrix is stored as it is multiplied, [K, N], K inputs and
N outputs: ONNX Runtime fuses ``MatMul(x, DequantizeLinear(w))`` to one kernel only where no Transpose stands between,
and TensorRT takes that form, too (measured: ONNX Runtime 1.31, TensorRT-RTX 1.7).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmtrim.graphs.errors import GraphError

if TYPE_CHECKING:
    from vlmtrim.graphs.later import ir
    from vlmtrim.graphs.ops import Ops

GIVEN = ("int4_sum", "int4_zero")  # formats that only checkpoints of the hub come in
CHANNEL = 0  # as a block: one scale a column, whatever K is
SLICE = 1 << 17  # weights whose scales are searched at once; they stay in a core's cache


@dataclass(frozen=True)
class Array:
    """One stored array of a matrix: its name is ``<parameter>.<suffix>``; dtype as ONNX names it, in small letters."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return -(-math.prod(self.shape) * BITS_OF[self.dtype] // 8)


BITS_OF = {
    "int4": 4, "float4e2m1": 4, "int8": 8, "float8e4m3fn": 8, "float16": 16, "bfloat16": 16, "float32": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How one parameter [N, K] of a model is stored: format, and block of K (CHANNEL for one scale a column)."""

    format: str
    block: int

    def arrays(self, inputs: int, outputs: int, dtype: str) -> tuple[Array, ...]:
        """What a matrix of K inputs and N outputs is stored as, scales in ``dtype``, that of the activations."""
        return load_format(self.format).arrays(inputs, outputs, self.block, dtype)

    def nbytes(self, inputs: int, outputs: int, dtype: str) -> int:
        """Bytes of it in the file."""
        return sum(array.nbytes for array in self.arrays(inputs, outputs, dtype))


def format_names() -> list[str]:
    """Names of the formats that floats may be packed in, from the files there are; nothing is imported."""
    others = (*GIVEN, "scales")
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in others)


def load_format(name: str) -> Any:
    """The module of a format in :func:`format_names` or GIVEN."""
    return importlib.import_module(f"{__name__}.{name}")


def is_calibrated(name: str) -> bool:
    """Whether a format is of integers that may be rounded by what their inputs are."""
    return hasattr(load_format(name), "LIMITS")


def fitting_block(name: str, inputs: int, block: int) -> int | None:
    """The block that a matrix of K inputs gets: the largest of the format's up to ``block`` that divides K; None where
    none does. One block that is all of K is CHANNEL where the format has it: TensorRT-RTX 1.7 cannot build the other
    spelling of the same."""
    blocks = load_format(name).BLOCKS
    found = max((size for size in blocks if 0 < size <= block and inputs % size == 0), default=None)
    whole = block == CHANNEL or found == inputs
    return CHANNEL if whole and CHANNEL in blocks else found


def check_block(name: str, block: int) -> None:
    """Raise GraphError for a block that the format does not take."""
    allowed = load_format(name).BLOCKS
    if block not in allowed:
        said = ", ".join("channel" if size == CHANNEL else str(size) for size in allowed)
        given = "channel" if block == CHANNEL else block
        raise GraphError(f"--block is {given}; {name} weights take {said}")


def scale_shape(inputs: int, outputs: int, block: int) -> tuple[int, ...]:
    """Shape of the scales of a matrix of K inputs and N outputs: [K / block, N], or [N] for CHANNEL."""
    return (outputs,) if block == CHANNEL else (inputs // block, outputs)


def dequantise(ops: Ops, stored: Sequence[ir.Value], block: int) -> ir.Value:
    """The matrix [K, N] in the scales' dtype, of integers or floats, their scales and, where there are any, zero
    points."""
    layout = {"axis": 1} if block == CHANNEL else {"axis": 0, "block_size": block}
    matrix = ops("DequantizeLinear", *stored, **layout)
    matrix.type, matrix.shape = stored[1].type, stored[0].shape
    return matrix


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two a byte, the first in the low half, as ONNX stores them: uint8 [n / 2]."""
    flat = codes.reshape(-1).astype(np.uint8) & 0xF
    return flat[0::2] | (flat[1::2] << 4)
