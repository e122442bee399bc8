"""Optimisation profiles, computed from the contract's dims and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmtrim.graphs.contract import IMAGES, Contract, TensorSpec
from vlmtrim.runtime.errors import RuntimeRefusal

# The text around the pictures that kernels are tuned for; any length within the limits runs.
_TYPICAL_TEXT = 64
# Live windows come in multiples of this, so that decode steps repeat their shapes and CUDA graphs can be replayed. On
# average 64 keys too many are read: for a 7B model 0.03 GB a step, beside 13.5 GB of weights.
BUCKET = 128


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
DECODE = "decode"
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
    tokens = min(_TYPICAL_TEXT + (0 if contract.crosses else visual), dims["S"][1])
    prefill = {"B": batch, "S": Range(1, tokens, dims["S"][1]), "N": Range(0, visual, dims["N"][1])}
    decode = {"B": batch, "S": Range(1, 1, 2), "N": Range(0, 0, 0)}
    for name in (name for name in dims if name[:2] == "Sk"):  # enters the pieces of a chain behind a selection
        survivors = contract.groups[int(name[2:] or -1)].length(tokens, visual)
        prefill[name], decode[name] = Range(1, survivors, dims[name][1]), Range(1, 1, 2)
    for name in (name for name in dims if name[:2] == "Nk" and name != "Nk"):  # visual tokens of those, between stages
        left = contract.groups[int(name[2:])].length(visual, visual)
        prefill[name], decode[name] = Range(0, left, dims[name][1]), Range(0, 0, 0)
    if "Nk" in dims:  # image features
        kept = max(group.length(0, visual) for group in contract.groups if group.source == IMAGES)
        prefill["Nk"], decode["Nk"] = Range(0, kept, dims["Nk"][1]), Range(0, 0, 0)
    if "R" in dims:  # rows whose attention is summed: a question's text, and a decode step's one token
        prefill["R"], decode["R"] = Range(0, min(_TYPICAL_TEXT, dims["R"][1]), dims["R"][1]), Range(0, 1, 1)
    for index, group in enumerate(contract.groups):
        window = Range(1, min(group.length(tokens, visual), group.capacity), group.capacity)
        prefill[f"W{index}"] = decode[f"W{index}"] = window
    return {"prefill": prefill, DECODE: decode}


def cache_profiles(contract: Contract) -> dict[str, Profile]:
    """One profile of a cache policy's graphs: any window, and what stays of it."""
    assert contract.cache is not None
    wide = decoder_profiles(contract)["prefill"]
    ranges = {dim: Range(low, high, high) for dim, (low, high) in contract.dims.items() if dim in ("C", "W", "M")}
    window = max(wide[f"W{index}"].opt for index in range(len(contract.groups)))
    kept = max(1, int(window * contract.cache.share))
    ranges["W"], ranges["M"] = (Range(1, opt, contract.dims["W"][1]) for opt in (window, kept))
    rows = contract.dims["R"][1]
    return {"all": {"B": wide["B"], "R": Range(0, rows, rows), **ranges}}


def shift_profiles(contract: Contract) -> dict[str, Profile]:
    """One profile of the graphs that move a window: any rows."""
    return {"rows": {"B": decoder_profiles(contract)["prefill"]["B"]}}


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


def choose(profiles: Mapping[str, Profile], sizes: Mapping[str, int], graph: str) -> str:
    """Name of the profile for these sizes: the last that admits them, since later ones are for narrower steps.

    Raises:
        RuntimeRefusal: none admits them; names the dimension, its size and the limits of the widest profile.
    """
    for name in reversed(list(profiles)):
        if admits(profiles[name], sizes):
            return name
    widest, ranges = next(iter(profiles.items()))
    wrong = {dim: size for dim, size in sizes.items() if dim in ranges and not admits(ranges, {dim: size})}
    found = ", ".join(f"{dim} is {size}, {ranges[dim].min} to {ranges[dim].max} fit" for dim, size in wrong.items())
    raise RuntimeRefusal(
        f"{graph}: a step does not fit the engine's profiles ({widest}: {found}); shorten the prompt, or export with "
        "larger limits (--max-seq-len, --max-batch) and build the engines again"
    )


def bucket(length: int, capacity: int) -> int:
    """The live window for ``length`` entries: the next multiple of BUCKET, at most the capacity."""
    return max(length, min(-(-length // BUCKET) * BUCKET, capacity))


def to_json(profiles: Mapping[str, Profile]) -> dict[str, dict[str, list[int]]]:
    """Profiles as engines.json holds them, in the engine's order."""
    return {name: {dim: [r.min, r.opt, r.max] for dim, r in ranges.items()} for name, ranges in profiles.items()}


def from_json(raw: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, Profile]:
    """The inverse of :func:`to_json`. Raises ValueError where limits are out of order."""
    return {name: {dim: Range(*limits) for dim, limits in ranges.items()} for name, ranges in raw.items()}
