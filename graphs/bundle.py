"""The bundle on disk: written whole or not at all, every file under a sha256, refused when one differs.

A large file that did not change since it was last hashed is not hashed again (:mod:`vlmtrim.graphs.checksums`).

Standard library only: the runtime reads bundles with it.

    contract.json             what the graphs promise (vlmtrim.graphs.contract)
    job.json                  what was asked for, and the versions that made it
    vision.onnx embed.onnx decoder.onnx
    *.safetensors             the weights, once; the graphs point into them
    config.json tokenizer.json tokenizer_config.json preprocessor_config.json chat_template.jinja ...
    *.engine engines.json     TensorRT engines and their fingerprints, where built
    SHA256SUMS                checksums of all the above; ``sha256sum -c SHA256SUMS`` checks them too
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlmtrim.graphs.checksums import known_sha256
from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import BundleError, Folder

SUMS = "SHA256SUMS"
_PARTIAL = ".partial-"


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


def seal(folder: Path) -> None:
    """Write the checksums of every file of a finished bundle."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != SUMS)
    (folder / SUMS).write_text("".join(f"{known_sha256(folder / name)}  {name}\n" for name in names))


def open_bundle(folder: str | Path) -> Bundle:
    """Check every file of a bundle and read its contract. Raises BundleError naming the file at fault."""
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        found = "no such folder" if not folder.is_dir() else f"it has no {SUMS}"
        raise BundleError(f"{folder} is no bundle: {found}; make one with export-vlm")
    sums = {}
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise BundleError(f"{folder / SUMS} is damaged (no text); export the model again") from error
    for line in lines:
        digest, _, name = line.partition("  ")
        if not name or "/" in name:
            raise BundleError(f"{folder / SUMS} is damaged: {line!r}; export the model again")
        sums[name] = digest
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing; export the model again")
        if known_sha256(path) != digest:
            raise BundleError(f"{path} is damaged or was edited (its sha256 differs); export the model again")
    for required in ("contract.json", "decoder.onnx"):
        if required not in sums:
            raise BundleError(f"{folder} has no {required}; export the model again")
    try:
        contract = Contract.from_json((folder / "contract.json").read_text())
    except ValueError as error:
        raise BundleError(f"{folder / 'contract.json'}: {error}") from error
    return Bundle(folder, contract, sums)


@contextmanager
def staging(target: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes it when the block ends without an exception.

    Raises FileExistsError where ``target`` exists and ``force`` is not set, or where it is something other than a
    bundle (then not even ``force`` replaces it). Leftovers of killed exports are removed first.
    """
    target = target.absolute()
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            retired = target.parent / f".{target.name}.old{_PARTIAL}{os.getpid()}"
            target.rename(retired)
            partial.rename(target)
            shutil.rmtree(retired)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, force: bool) -> None:
    """Raise FileExistsError where ``target`` must not be written."""
    if not target.exists():
        return
    if not force:
        raise FileExistsError(f"{target} exists; give another --output, or --force to replace it")
    if not target.is_dir() or (not (target / SUMS).is_file() and any(target.iterdir())):
        raise FileExistsError(f"{target} is no bundle, so it is not replaced; give another --output")


def _remove_leftovers(target: Path) -> None:
    for folder in target.parent.glob(f".{target.name}*{_PARTIAL}*"):
        owner = folder.name.rpartition(_PARTIAL)[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
