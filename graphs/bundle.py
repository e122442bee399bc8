"""The bundle on disk: every file under a sha256, refused when one differs (:mod:`vlmtrim.graphs.staging` writes it).

A large file that did not change since it was last hashed is not hashed again (:mod:`vlmtrim.graphs.checksums`).

Standard library only: the runtime reads bundles with it.

    contract.json             what the graphs promise (vlmtrim.graphs.contract)
    job.json                  what was asked for, and the versions that made it
    vision.onnx embed.onnx decoder.onnx
    *.safetensors             the weights, once; the graphs point into them
    config.json tokenizer.json tokenizer_config.json preprocessor_config.json chat_template.jinja ...
    prompt.json               the chat template as segments, for the C++ runtime
    *.engine engines.json     TensorRT engines and their fingerprints, where built
    SHA256SUMS                checksums of all the above; ``sha256sum -c SHA256SUMS`` checks them too
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmtrim.graphs import agreement
from vlmtrim.graphs.checksums import Progress, counter, known_sha256, sha256, silent
from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.external import external_files
from vlmtrim.graphs.reading import BundleError, Folder, is_plain_name, shown

SUMS = "SHA256SUMS"
LARGEST_SUMS = 1 << 20  # bytes; a bundle of a hundred shards has 10 KB of them
LARGEST_CONTRACT = 16 << 20  # bytes; a decoder of 100 layers cut into 50 pieces has 0.5 MB of contract
LARGEST_GRAPH = 2 << 30  # bytes; a protobuf has no more
_SUM = re.compile(r"([0-9a-f]{64})  ([^\n]+)")  # as sha256sum writes it
_USED = frozenset({".json", ".jinja", ".onnx", ".safetensors"})
ENGINES = "engines.json"  # like the engines it lists, outside the checksums while they are being built


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    folder: Path
    contract: Contract
    sums: dict[str, str]

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.folder / name

    @property
    def files(self) -> Folder:
        """The files under a checksum, the only ones that may be read."""
        return Folder(self.folder, self.sums)

    @property
    def digest(self) -> str:
        """One sha256 for the whole bundle."""
        return hashlib.sha256("".join(f"{k}{v}" for k, v in sorted(self.sums.items())).encode()).hexdigest()


def seal(folder: Path, progress: Progress = silent) -> None:
    """Write the checksums of every file of a finished bundle; ``progress`` is told bytes done and bytes in all."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != SUMS)
    watch = counter(progress, sum((folder / name).stat().st_size for name in names))
    (folder / SUMS).write_text("".join(f"{known_sha256(folder / name, watch)}  {name}\n" for name in names))


def open_bundle(folder: str | Path, verify: bool = False, progress: Progress = silent) -> Bundle:
    """Check every file of a bundle and read its contract.

    Args:
        folder: of the bundle.
        verify: hash every byte, also of large files that were hashed before and seem unchanged.
        progress: is told how many bytes of how many are hashed, or known.

    Raises:
        BundleError: naming the file at fault. What opens is coherent: every file that will be used is a regular file
            of the folder, under a checksum that it fits, and the parts of the contract agree.
    """
    folder = Path(folder)
    sums = read_sums(folder)
    bundle_files = Folder(folder, sums)
    for name in sums:
        if not os.path.lexists(folder / name):
            raise BundleError(f"{folder / name} is missing; export the model again")
    paths = {name: bundle_files.file(name) for name in sums}
    watch = counter(progress, sum(path.stat().st_size for path in paths.values()))
    for name, path in paths.items():
        if (sha256 if verify else known_sha256)(path, watch) != sums[name]:
            raise BundleError(f"{path} is damaged or was edited (its sha256 differs); export the model again")
    for required in ("contract.json", "decoder.onnx"):
        if required not in sums:
            raise BundleError(f"{folder} has no {required}; export the model again")
    _refuse_unlisted(folder, sums)
    contract = Contract.from_json(bundle_files.text("contract.json", LARGEST_CONTRACT), str(folder / "contract.json"))
    agreement.check(contract, str(folder / "contract.json"))
    for spec in contract.graphs.values():
        _check_graph(bundle_files, spec.file)
    return Bundle(folder, contract, sums)


def read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS: name -> digest. Raises BundleError."""
    if not (folder / SUMS).is_file():
        found = "no such folder" if not folder.is_dir() else f"it has no {SUMS}"
        raise BundleError(f"{folder} is no bundle: {found}; make one with export-vlm")
    sums: dict[str, str] = {}
    for line in Folder(folder).text(SUMS, LARGEST_SUMS).splitlines():
        match = _SUM.fullmatch(line)
        if match is None or not is_plain_name(match[2]) or match[2] in (*sums, SUMS):
            raise BundleError(f"{folder / SUMS} is damaged: {shown(line)}; export the model again")
        sums[match[2]] = match[1]
    return sums


def _refuse_unlisted(folder: Path, sums: Mapping[str, str]) -> None:
    """A file that would be used if it were listed must not lie beside the bundle's own: dropping a line of SHA256SUMS
    would change what runs. Other files, such as a README, are none of the bundle's business."""
    for path in folder.iterdir():
        if path.suffix in _USED and path.name not in (*sums, ENGINES):
            raise BundleError(f"{path} is not listed in {SUMS}, so it is no part of the bundle; take it out")


def _check_graph(bundle_files: Folder, name: str) -> None:
    """Whether a graph takes its weights from files of the bundle alone."""
    try:
        outside = external_files(bundle_files.bytes(name, LARGEST_GRAPH)) - bundle_files.names
    except ValueError as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{bundle_files.path / name} is no ONNX file: {error}; export the model again") from error
    if outside:
        raise BundleError(
            f"{bundle_files.path / name} takes weights from {shown(min(outside))}, which is no file of the bundle; "
            "export the model again"
        )
