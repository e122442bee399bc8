"""What takes long to compute, kept in the user's cache folder; a folder that cannot be written is no error."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def folder() -> Path:
    """``$XDG_CACHE_HOME/vlmtrim``, by default ``~/.cache/vlmtrim``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmtrim"


def read(name: str) -> bytes:
    """What was kept under a name; empty where nothing was."""
    try:
        return (folder() / name).read_bytes()
    except OSError:
        return b""


def write(name: str, data: bytes) -> None:
    """Keep data under a name. Written beside and renamed, so that a kill leaves no half file."""
    path = folder() / name
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
