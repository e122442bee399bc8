"""A dataclass as the schema of its JSON: fields by name, every value by the type and the range of its annotation.

The annotations are the documentation of the file at the same time. Standard library only.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from vlmtrim.graphs import reading
from vlmtrim.graphs.reading import BundleError, shown


@dataclass(frozen=True)
class Range:
    """Inclusive limits of a number."""

    low: float
    high: float


@dataclass(frozen=True)
class Among:
    """The texts that a field may hold."""

    values: Collection[str]

    def __hash__(self) -> int:
        return hash(tuple(self.values))


def decode(kind: Any, value: Any, where: str) -> Any:
    """What a JSON value stands for, as ``kind``: a dataclass, tuple, mapping, union, number, text or boolean.

    Raises BundleError naming the place, e.g. ``contract.json: groups[1].removed is -5; expected ...``.
    """
    return _decode(kind, value, where + ": ")


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _limited(args[0], args[1], value, where)
    if origin in (Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is tuple:
        return _sequence(args, value, where)
    if origin is not None:  # a mapping
        if not isinstance(value, dict):
            raise BundleError(f"{where} is {shown(value)}; expected an object")
        return {name: _decode(args[1], item, _inside(where, name)) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    if kind is Any:
        return value
    if kind is str:
        return reading.text(value, where)
    if kind is bool:
        return reading.boolean(value, where)
    raise TypeError(f"{where}: a schema cannot hold {kind}; annotate numbers with a Range")


def _limited(kind: Any, limits: Any, value: Any, where: str) -> Any:
    if isinstance(limits, Among):
        if value not in limits.values:
            raise BundleError(f"{where} is {shown(value)}; expected one of {', '.join(limits.values)}")
        return value
    if kind is int:
        return reading.integer(value, where, int(limits.low), int(limits.high))
    return reading.number(value, where, limits.low, limits.high)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of a union the first kind that the value fits; a mistake is told of the last, so the richest stands there."""
    if value is None and types.NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        try:
            return _decode(kind, value, where)
        except BundleError:
            continue
    return _decode(last, value, where)


def _sequence(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise BundleError(f"{where} is {shown(value)}; expected a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise BundleError(f"{where} has {len(value)} entries; expected {len(kinds)}")
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _record(kind: Any, value: Any, where: str) -> Any:
    place = where.removesuffix(": ")
    if not isinstance(value, dict):
        raise BundleError(f"{place} is {shown(value)}; expected an object")
    hints, needed = _fields(kind)
    if missing := sorted(needed - value.keys()):
        raise BundleError(f"{place} has no {missing[0]}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise BundleError(f"{place} has an unknown field {shown(unknown[0])}")
    return kind(**{name: _decode(hints[name], item, _inside(where, name)) for name, item in value.items()})


@cache
def _fields(kind: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    """(field -> annotation, fields without a default) of a dataclass."""
    fields, missing = dataclasses.fields(kind), dataclasses.MISSING
    needed = frozenset(f.name for f in fields if f.default is missing and f.default_factory is missing)
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields}, needed


def _inside(where: str, name: str) -> str:
    name = name if len(name) <= reading.LONGEST_SHOWN else f"{name[: reading.LONGEST_SHOWN]}..."
    return f"{where}{name}" if where.endswith(": ") else f"{where}.{name}"
