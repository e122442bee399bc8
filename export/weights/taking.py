"""How a checkpoint's files come into a bundle: cloned where the file system can, else copied; hard-linked if asked.

A clone (reflink) is a file of its own that shares the bytes on disk until one of the two is written. A hard link costs
nothing anywhere, but is the checkpoint's file under another name: onnx and Polygraphy refuse to read such files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmtrim.export.job import Refusal
from vlmtrim.runtime.progress import Progress

CLONED, COPIED, LINKED, WRITTEN = "cloned", "copied", "linked", "written"
COPY_BYTES = 1 << 24
_CLONE = 0x40049409  # FICLONE


def how(files: Sequence[Path], folder: Path, link: bool) -> str:
    """CLONED, COPIED or LINKED: what the file system of ``folder`` allows with ``files``, tried there.

    Raises Refusal where links were asked for and cannot be made.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".vlmtrim-", dir=folder) as scratch:
            place = Path(scratch) / "tried"
            if not link:
                return CLONED if all(_clone(file.resolve(), place) for file in files) else COPIED
            for file in files:
                os.link(file.resolve(), place)
                place.unlink()
            return LINKED
    except OSError as error:
        if not link:
            return COPIED
        other = error.errno == errno.EXDEV
        reason = "they lie on two file systems" if other else error.strerror
        raise Refusal(
            f"--link-weights: files in {files[0].parent} cannot be linked into {folder} ({reason}); leave it out, and "
            "the weights are copied"
        ) from error


def take(files: Mapping[Path, Path], link: bool, progress: Progress) -> None:
    """Bring files to the places given for them. Raises OSError where ``link`` is set and not possible."""
    total = sum(file.stat().st_size for file in files)
    done = 0
    for file, target in files.items():
        source = file.resolve()  # a hub snapshot holds links; a bundle must hold the data
        if link:
            os.link(source, target)
        elif not _clone(source, target):
            for written in _copy(source, target):
                progress(done + written, total)
        done += source.stat().st_size
        progress(done, total)


def _clone(source: Path, target: Path) -> bool:
    """Make ``target`` a clone; False where the file system cannot."""
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _CLONE, reader.fileno())
        except OSError:
            return False
    return True


def _copy(source: Path, target: Path) -> Iterator[int]:
    """Copy piece by piece; yields the bytes written so far."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(COPY_BYTES):
            writer.write(piece)
            yield writer.tell()
