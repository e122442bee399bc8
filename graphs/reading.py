"""Reads what strangers wrote: files of a bundle by plain name, JSON within limits, values by type and range.

A bundle is data that people download, and anyone can compute its checksums again after a change. So a file is opened
without following links and must be regular; JSON is bounded in size and depth; every value is checked before it is
used. Whatever is wrong is a :class:`BundleError` that names the file. Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_TEXT = 64 << 20  # bytes of a JSON or text file; tokenizers of large vocabularies have 10 to 30 MB
DEEPEST_JSON = 64  # brackets inside brackets; the files of a bundle need 8
LONGEST_SHOWN = 60  # characters of a wrong value in a message
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(r"[^][{}]+")


class BundleError(ValueError):
    """A folder that is no bundle, or one that is damaged; the message names the file."""


class Folder:
    """The files of a folder that may be read: by plain name, regular ones, never through a link.

    Args:
        path: of the folder.
        names: the only files that may be read, those under a checksum; None for every regular file of the folder.
    """

    def __init__(self, path: str | Path, names: Collection[str] | None = None):
        self.path = Path(path)
        self._names = None if names is None else frozenset(names)

    @property
    def names(self) -> frozenset[str]:
        """The files that may be read."""
        return frozenset(os.listdir(self.path)) if self._names is None else self._names

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of that name that belongs to the folder, whatever it is like."""
        if not isinstance(name, str) or not is_plain_name(name):
            return False
        return os.path.lexists(self.path / name) if self._names is None else name in self._names

    def file(self, name: str) -> Path:
        """Path of a regular file of the folder. Raises BundleError."""
        os.close(self._open(name))
        return self.path / name

    def stream(self, name: str) -> BinaryIO:
        """A regular file of the folder, opened for reading. Raises BundleError."""
        return os.fdopen(self._open(name), "rb")

    def bytes(self, name: str, limit: int = LARGEST_TEXT) -> bytes:
        """Contents of a file of at most ``limit`` bytes. Raises BundleError."""
        with self.stream(name) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise BundleError(f"{self.path / name} has more than {limit} bytes, the most that this file may have")
        return data

    def text(self, name: str, limit: int = LARGEST_TEXT) -> str:
        """Contents of a UTF-8 file. Raises BundleError."""
        try:
            return self.bytes(name, limit).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.path / name} is no UTF-8 text (byte {error.start})") from error

    def json(self, name: str, limit: int = LARGEST_TEXT) -> dict[str, Any]:
        """The object that a JSON file holds. Raises BundleError."""
        return json_object(self.text(name, limit), str(self.path / name))

    def _open(self, name: str) -> int:
        if not is_plain_name(name):
            raise BundleError(f"{self.path}: {shown(name)} is no plain file name; files lie in the bundle's own folder")
        path = self.path / name
        if self._names is not None and name not in self._names:
            raise BundleError(f"{path} is not listed in the bundle's checksums, so it is not used")
        try:
            # Without following a link, and without waiting for the other end of a FIFO.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if path.is_symlink():
                raise BundleError(f"{path} is a link; a bundle holds its files itself") from error
            raise BundleError(f"{path} cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BundleError(f"{path} is no regular file")
        return descriptor


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself: no separators, no ``..``, nothing that cannot be one."""
    return 0 < len(name) <= 255 and name not in (".", "..") and not any(c in "/\\" or ord(c) < 32 for c in name)


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object that a JSON text holds; its depth is bounded. Raises BundleError naming ``where``."""
    depth = deepest = 0
    for char in _outside_strings(text):
        depth += (char in "[{") - (char in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST_JSON:
        raise BundleError(f"{where} nests {deepest} deep; the limit is {DEEPEST_JSON}")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of thousands of digits
        raise BundleError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise BundleError(f"{where} holds {_kind(found)}; expected an object")
    return found


def _outside_strings(text: str) -> str:
    """The brackets of a JSON text that stand outside strings, in order."""
    return _BRACKETS.sub("", _STRINGS.sub("", text))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def integer(value: Any, where: str, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``, given back. Raises BundleError naming ``where``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BundleError(f"{where} is {shown(value)}; expected an integer from {low} to {high}")
    return value


def number(value: Any, where: str, low: float, high: float) -> float:
    """A finite number from ``low`` to ``high``, given back as float. Raises BundleError naming ``where``."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or not math.isfinite(value):
        raise BundleError(f"{where} is {shown(value)}; expected a number from {low:g} to {high:g}")
    return float(value)


def boolean(value: Any, where: str) -> bool:
    """True or False, given back. Raises BundleError naming ``where``."""
    if not isinstance(value, bool):
        raise BundleError(f"{where} is {shown(value)}; expected true or false")
    return value


def text(value: Any, where: str, most: int = 4096) -> str:
    """A string of at most ``most`` characters, given back. Raises BundleError naming ``where``."""
    if not isinstance(value, str) or len(value) > most:
        raise BundleError(f"{where} is {shown(value)}; expected a text of at most {most} characters")
    return value


def shown(value: Any) -> str:
    """A value for a message: on one line, cut where it is long."""
    if isinstance(value, dict | list):
        return _kind(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    said = repr(value)
    return said if len(said) <= LONGEST_SHOWN else f"{said[:LONGEST_SHOWN]}..."


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        tuple: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
