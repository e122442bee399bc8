"""sha256 of files; of large ones it is computed once and remembered by the file's identity, size and time of change.

Weights of 14 GB take many seconds to hash, and a bundle is opened often. What is remembered lies in the user's cache
folder, one small file each; a file whose size or modification time differs is hashed again. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Watch = Callable[[int], None]  # bytes of one piece
Progress = Callable[[int, int], None]  # bytes done, bytes in all
PIECE = 1 << 20
LARGE = 64 << 20  # bytes from which on a digest is remembered
SETTLED = 2.0  # seconds; a file that changed just now may change again within one tick of its clock


def sha256(path: Path, watch: Watch = lambda count: None) -> str:
    """Hex digest of a file's bytes, always computed; ``watch`` is told how many bytes were read, piece by piece."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            digest.update(piece[:count])
            watch(count)
    return digest.hexdigest()


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def counter(progress: Progress, total: int) -> Watch:
    """Adds up what ``watch`` of several files is told."""
    done = 0

    def watch(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return watch


def known_sha256(path: Path, watch: Watch = lambda count: None) -> str:
    """Hex digest of a file, remembered for large files that did not change since."""
    before = path.stat()
    if before.st_size < LARGE:
        return sha256(path, watch)
    note = _folder() / f"{before.st_dev:x}-{before.st_ino:x}"
    identity = f"{before.st_size} {before.st_mtime_ns} "
    try:
        remembered = note.read_text()
    except (OSError, UnicodeDecodeError):
        remembered = ""
    if remembered.startswith(identity):
        watch(before.st_size)
        return remembered.removeprefix(identity)
    digest, after = sha256(path, watch), path.stat()
    unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if unchanged and time.time() - after.st_mtime > SETTLED:
        _remember(note, identity + digest)
    return digest


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmtrim" / "sha256"


def _remember(note: Path, text: str) -> None:
    """Written beside and renamed, so that a kill leaves no half digest; a read-only home is no error."""
    fresh = note.with_name(f"{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text)
        fresh.replace(note)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
