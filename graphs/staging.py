"""Writes a bundle's folder whole or not at all, and replaces nothing but what surely is a bundle.

    .NAME.partial-PID        being written; it becomes NAME when it is finished
    .NAME.old.partial-PID    what NAME was, while a file system that cannot swap two folders gets the new one
    .NAME.lock               held by the export to NAME

A kill leaves some of them; the next export to NAME takes the lock, brings back an old bundle that no new one took the
place of, and removes the rest. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlmtrim.graphs.bundle import SUMS, read_sums
from vlmtrim.graphs.reading import BundleError, Folder

PRODUCER = "vlmtrim"
LONGEST_NAME = 200  # bytes of a bundle's own name; temporary names beside it have a suffix, a file system takes 255
_NAMED = 3  # files in the way that a refusal lists
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2
_HERE = -100  # AT_FDCWD
_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # of renameat2: the kernel or the file system has it not


class TargetError(OSError):
    """A folder that a bundle cannot be written to, or must not; the message is one sentence for the user."""


@contextmanager
def staging(target: str | Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that becomes it when the block ends without an exception.

    One process at a time writes to a target. With ``force`` a bundle that stands there is replaced in one step, or,
    where the file system cannot, kept until the new one stands.

    Raises TargetError before the block where ``target`` must not be written (:func:`check_target`) or another process
    is writing to it, and after it where something else took its place meanwhile.
    """
    check_target(target, force)
    target = _place(target)
    made = _make_parents(target.parent)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        with _lock(target):
            _recover(target)
            check_target(target, force)
            partial.mkdir()
            try:
                yield partial
                _put(partial, target, force)
                _remove_retired(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise


def check_target(target: str | Path, force: bool) -> None:
    """Raise TargetError where ``target`` must not be written: before any work, and again before it is written."""
    for parent in Path(target).absolute().parents:
        if parent.is_symlink() and not parent.exists():
            raise TargetError(f"{target} would lie under {parent}, a symbolic link to nothing; give another --output")
    shown, target = target, _place(target)
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise TargetError(f"the name {target.name[:20]}... has more than {LONGEST_NAME} bytes; give a shorter --output")
    if target.is_symlink():
        raise TargetError(f"{shown} is a symbolic link; give the folder that is meant as --output")
    for parent in target.parents:
        if (parent / "contract.json").is_file() and (parent / SUMS).is_file():
            raise TargetError(f"{shown} lies inside the bundle {parent}, which holds no folders; give another --output")
    if os.path.lexists(target):
        if not force:
            raise TargetError(f"{shown} exists; give another --output, or --force to replace it")
        if reason := _no_bundle(target):
            raise TargetError(f"{shown} {reason}, so it is not replaced; give another --output")
    standing = nearest_folder(target)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{PRODUCER}-", dir=standing))
    except OSError as error:
        raise TargetError(f"{standing} cannot be written ({error.strerror}); give another --output") from error


def nearest_folder(target: str | Path) -> Path:
    """The folder that stands already and that ``target`` will lie in, at whatever depth. Raises TargetError."""
    standing = next(parent for parent in _place(target).parents if os.path.lexists(parent))
    if not standing.is_dir():
        raise TargetError(f"{target} would lie under {standing}, which is no folder; give another --output")
    return standing


def _place(target: str | Path) -> Path:
    """The absolute path that is meant; its last part may be a link, its parents are what links lead to."""
    path = Path(target)
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def _no_bundle(folder: Path) -> str | None:
    """Why a folder is not surely a bundle of this producer and nothing else; None where it is, or is empty."""
    if not folder.is_dir():
        return "is no folder"
    entries = {entry.name: entry for entry in os.scandir(folder)}
    if not entries:
        return None
    try:
        sums = read_sums(folder)
        made = Folder(folder, {"contract.json", "job.json"})
        producer, versions = made.json("contract.json").get("producer"), made.json("job.json").get("versions")
    except (BundleError, OSError) as error:
        return f"is no bundle ({error})"
    if not str(producer).startswith(PRODUCER) or not isinstance(versions, dict) or PRODUCER not in versions:
        return f"is no bundle (contract.json and job.json do not name {PRODUCER} as what made it)"
    others = sorted(
        name for name, entry in entries.items() if name not in (*sums, SUMS) or not entry.is_file(follow_symlinks=False)
    )
    if others:
        rest = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        return f"holds {', '.join(others[:_NAMED])}{rest} besides the bundle's own files"
    return None


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, the outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Held while the block runs; a kill releases it. Raises TargetError where another process holds it."""
    path = target.parent / f".{target.name}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.stat(path).st_ino == os.fstat(descriptor).st_ino  # else its holder has just removed it
        except FileNotFoundError:
            held = False
        except OSError as error:
            os.close(descriptor)
            busy = isinstance(error, BlockingIOError)
            reason = "another export is writing to it" if busy else f"it cannot be locked ({error.strerror})"
            raise TargetError(f"{target}: {reason}; wait for its end, or give another --output") from error
        if held:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _put(partial: Path, target: Path, force: bool) -> None:
    """The finished folder takes its place; looks again at what stands there. Raises TargetError."""
    try:
        return _rename(partial, target, _NOREPLACE)
    except FileExistsError as error:
        if not force:
            raise TargetError(f"{target} was made while this export ran; give another --output") from error
    check_target(target, force)
    names = (target.parent / f".{target.name}.old.partial-{number}" for number in itertools.count(os.getpid()))
    retired = next(path for path in names if not os.path.lexists(path))
    try:
        _rename(partial, target, _EXCHANGE)
        partial.rename(retired)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        target.rename(retired)
        partial.rename(target)
    return None


def _rename(source: Path, target: Path, flag: int) -> None:
    """``renameat2``; without it, NOREPLACE is a look and a rename. Raises OSError."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if call is not None:
        if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), ctypes.c_uint(flag)) == 0:
            return
        code = ctypes.get_errno()
    if flag != _NOREPLACE or code not in _UNABLE:
        raise OSError(code, os.strerror(code), str(source), None, str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(source), None, str(target))
    source.rename(target)


def _leftovers(target: Path) -> list[Path]:
    """What killed exports to ``target`` left. Only the holder of the lock may ask."""
    pattern = re.compile(rf"\.{re.escape(target.name)}(\.old)?\.partial-\d+")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def _recover(target: Path) -> None:
    """Bring back the bundle that a killed export had moved aside, and remove what killed exports had begun."""
    for path in _leftovers(target):
        if not path.name.startswith(f".{target.name}.old."):
            shutil.rmtree(path, ignore_errors=True)
        elif not os.path.lexists(target):
            path.rename(target)


def _remove_retired(target: Path) -> None:
    """The new bundle stands: what it replaced goes, the files it lists and the folder, which stays if it holds more."""
    for folder in _leftovers(target):
        with suppress(OSError, BundleError):
            for name in (*read_sums(folder), SUMS):
                (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; those of processes that were killed are removed first."""
    base = Path(tempfile.gettempdir())
    for path in base.glob(f"{PRODUCER}-*"):
        owner = re.fullmatch(rf"{PRODUCER}-(\d+)-\w+", path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove_unheld(path)
    with tempfile.TemporaryDirectory(prefix=f"{PRODUCER}-{os.getpid()}-") as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for those who do not see this process, in another container
            yield Path(folder)
        finally:
            os.close(descriptor)


def _remove_unheld(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
