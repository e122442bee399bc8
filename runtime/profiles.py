"""Optimisation profiles, computed from the contract's dims and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmtrim.graphs.contract import Contract, TensorSpec

# The text around the pictures that kernels are tuned for; any length within the limits runs.
_TYPICAL_TEXT = 64


@dataclass(frozen=True)
class Range:
    """Smallest, most likely and largest size of a dimension."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a profile needs 0 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}")


Profile = Mapping[str, Range]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def vision_profiles(contract: Contract) -> dict[str, Profile]:
    """One profile: any number of pictures the bundle allows, tuned for as many as it assumes."""
    most = contract.max_images * contract.dims["B"][1]
    assumed = min(contract.images_assumed * contract.dims["B"][1], most)
    symbols = {dim for tensor in contract.graphs["vision"].inputs for dim in tensor.shape if isinstance(dim, str)}
    ranges = {}
    for symbol in sorted(symbols):
        low, high = contract.dims[symbol]
        ranges[symbol] = Range(low, max(low, high * assumed // most), high)
    return {"images": ranges}


def decoder_profiles(contract: Contract) -> dict[str, Profile]:
    """Two profiles of one engine: prefill takes any step, decode one token and no visual tokens.

    The decode profile admits two tokens: a profile whose dims are all fixed makes TensorRT store the weights twice.
    """
    dims = contract.dims
    batch = Range(dims["B"][0], dims["B"][0], dims["B"][1])
    visual = min(contract.images_assumed * contract.image_tokens, dims["N"][1])
    tokens = min(visual + _TYPICAL_TEXT, dims["S"][1])
    prefill = {"B": batch, "S": Range(1, tokens, dims["S"][1]), "N": Range(0, visual, dims["N"][1])}
    decode = {"B": batch, "S": Range(1, 1, 2), "N": Range(0, 0, 0)}
    if "Sk" in dims:  # enters the pieces of a chain that lie behind a selection
        survivors = contract.groups[-1].length(tokens, visual)
        prefill["Sk"], decode["Sk"] = Range(1, survivors, dims["Sk"][1]), Range(1, 1, 2)
    for index, group in enumerate(contract.groups):
        window = Range(1, min(group.length(tokens, visual), group.capacity), group.capacity)
        prefill[f"W{index}"] = decode[f"W{index}"] = window
    return {"prefill": prefill, "decode": decode}


def shapes(tensor: TensorSpec, profile: Profile) -> Shapes:
    """(min, opt, max) shape of an input under a profile."""
    low, best, high = (
        tuple(dim if isinstance(dim, int) else getattr(profile[dim], bound) for dim in tensor.shape)
        for bound in ("min", "opt", "max")
    )
    return low, best, high


def admits(profile: Profile, sizes: Mapping[str, int]) -> bool:
    """Whether concrete sizes lie within a profile."""
    return all(profile[dim].min <= size <= profile[dim].max for dim, size in sizes.items() if dim in profile)
