"""What a contract says of matrices in fewer bits. Standard library only; part of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from vlmtrim.graphs.schema import Among, Range

# How they are stored (:mod:`vlmtrim.graphs.formats`), and what they belong to.
FORMATS = ("fp8", "int4", "int4_sum", "int4_zero", "int8", "nvfp4", "w8a8")
# Formats that TensorRT cannot read: why, and what to export instead.
WITHOUT_ENGINES = {
    "int4_zero": ("reads no zero points but 0", "--engine {}, which stores them another way"),
    "w8a8": ("has no layer that multiplies integers", "int8 in the place of w8a8"),
}
ROUNDING = ("w8a8",)  # formats whose graphs round activations to 8 bits, whatever the backend is told
TOWER, LAYERS, HEAD = "tower", "layers", "head"


@dataclass(frozen=True)
class Packed:
    """Matrices that are stored in fewer bits than they are multiplied in.

    Attributes:
        part: TOWER (of the vision graph), LAYERS or HEAD (the logits' matrix) of the decoder.
        format: of :mod:`vlmtrim.graphs.formats`.
        block: weights of a column that share a scale; 0: all of them.
        matrices: how many there are.
        weights: in all of them.
        nbytes: that they are stored in, with scales.
    """

    part: Annotated[str, Among((TOWER, LAYERS, HEAD))]
    format: Annotated[str, Among(FORMATS)]
    block: Annotated[int, Range(0, 4096)]  # a backend makes a matrix of two blocks to try them
    matrices: Annotated[int, Range(1, 2**31 - 1)]
    weights: Annotated[int, Range(1, 2**63 - 1)]
    nbytes: Annotated[int, Range(1, 2**63 - 1)]
