"""Whether the engines of a bundle are made for this library, this GPU and these graphs: ``engines.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from vlmtrim.graphs.bundle import ENGINES, read_sums
from vlmtrim.graphs.checksums import known_sha256, sha256
from vlmtrim.graphs.contract import Size
from vlmtrim.graphs.reading import Folder, shown
from vlmtrim.graphs.schema import Range, decode
from vlmtrim.runtime.engines import profiles as profile_rules
from vlmtrim.runtime.errors import RuntimeRefusal

FILE = ENGINES
# Oldest GPUs that an engine runs on when it was built for none in particular (TensorRT-RTX's default).
_PORTABLE_FROM = (8, 0)
_Limits = Mapping[str, Mapping[str, tuple[Size, Size, Size]]]  # of profiles, as engines.json holds them


@dataclass(frozen=True)
class Fingerprint:
    """What an engine is made for, and how.

    Attributes:
        library, version: what built it.
        compute_capabilities: GPUs it runs on, as "8.9"; none named: 8.0 and later.
        onnx_sha256: of the graph it was built from.
        bytes, seconds: size of the engine, time to build it.
        profiles: name -> dim -> range, in the engine's order.
    """

    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    onnx_sha256: str
    bytes: Annotated[int, Range(0, 2**62)]
    seconds: Annotated[float, Range(0, 1e9)]
    profiles: Mapping[str, profile_rules.Profile]

    def to_json(self) -> dict[str, Any]:
        """An entry of engines.json."""
        listed = list(self.compute_capabilities)
        return {**self.__dict__, "compute_capabilities": listed, "profiles": profile_rules.to_json(self.profiles)}

    @staticmethod
    def from_json(raw: Mapping[str, Any], where: str = FILE) -> Fingerprint:
        """The inverse of :meth:`to_json`. Raises BundleError where it is no entry."""
        read = decode(Fingerprint, {**raw, "profiles": {}}, where)
        limits = decode(_Limits, raw.get("profiles"), f"{where}: profiles")
        return dataclasses.replace(read, profiles=profile_rules.from_json(limits))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the engine was made for GPUs of a compute capability."""
        if not self.compute_capabilities:
            return capability >= _PORTABLE_FROM
        return f"{capability[0]}.{capability[1]}" in self.compute_capabilities


def build_command(folder: Path, library: str) -> str:
    """What builds the engines of an existing bundle."""
    return f"python -m vlmtrim.runtime.engines {folder} --library {library}"


def find(folder: Path, graph: str, library: str, version: str, capability: tuple[int, int]) -> Fingerprint:
    """Fingerprint of ``<graph>.engine``, made for what is here.

    Raises:
        RuntimeRefusal: there is no engine, or it is made for something else; ends with the command that builds it.
    """
    build = build_command(folder, library)
    prints = read(folder)
    name = f"{graph}.engine"
    if name not in prints or name not in Folder(folder, read_sums(folder)):
        missing = "no engines" if not prints else f"no {name}"
        raise RuntimeRefusal(f"{folder} has {missing}; build them with: {build}")
    found = prints[name]
    gpu = f"{capability[0]}.{capability[1]}"
    reason = None
    if found.library != library:
        reason = f"is made for {found.library} {found.version}, this is {library} {version}"
    elif found.version != version:
        reason = f"is made for {library} {found.version}, {version} is installed"
    elif not found.runs_on(capability):
        made_for = ", ".join(found.compute_capabilities) or "8.0 and later"
        reason = f"is made for GPUs of compute capability {made_for}, this one has {gpu}"
    elif found.onnx_sha256 != sha256(folder / f"{graph}.onnx"):
        reason = f"was built from another {graph}.onnx"
    elif (folder / name).stat().st_size != found.bytes:
        reason = f"has {(folder / name).stat().st_size} bytes instead of {found.bytes}"
    if reason is not None:
        raise RuntimeRefusal(f"{name} {reason}; build it again with: {build}")
    return found


def read(folder: Path) -> dict[str, Fingerprint]:
    """All fingerprints of a sealed bundle by file name; none where no engine was built. Raises RuntimeRefusal."""
    files = Folder(folder, read_sums(folder))
    if FILE not in files:
        return {}
    try:
        entries = decode(Mapping[str, Mapping[str, Any]], files.json(FILE), str(folder / FILE))
        return {name: Fingerprint.from_json(entry, f"{FILE} of {shown(name)}") for name, entry in entries.items()}
    except ValueError as error:
        raise RuntimeRefusal(f"{folder / FILE} is damaged ({error}); build the engines again") from error


def library_of(folder: Path) -> str | None:
    """The library that the bundle's engines are made for; None where there are none."""
    return next((entry.library for entry in read(folder).values()), None)


def kernels_key(folder: Path, graph: str, gpu: str) -> str:
    """A name for what is compiled out of one engine on one kind of GPU."""
    return f"{graph}-{known_sha256(folder / f'{graph}.engine')[:24]}-{''.join(c if c.isalnum() else '-' for c in gpu)}"
