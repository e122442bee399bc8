"""Which files an ONNX file takes weights from, read off its protobuf: a loader would follow those names.

Only what may hold a tensor is walked: graphs, nodes, attributes, functions, sparse tensors. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator

# Messages of onnx.proto3 (ONNX 1.19 to 1.22): number of a field -> the message in it.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry of TensorProto.external_data
_DEEPEST = 32  # graphs in attributes in graphs; the exporter nests none


def external_files(model: bytes | memoryview) -> set[str]:
    """Names of the files that a serialised ModelProto refers to, as they stand there.

    Raises ValueError where the bytes are no protobuf, or nest too deep.
    """
    found: set[str] = set()
    pending: list[tuple[str, memoryview, int]] = [("model", memoryview(model), 0)]
    while pending:
        kind, data, depth = pending.pop()
        if depth > 4 * _DEEPEST:
            raise ValueError(f"graphs nest more than {_DEEPEST} deep")
        if kind == "entry":
            if (name := _location(data)) is not None:
                found.add(name)
            continue
        wanted = _FIELDS[kind]
        pending += [(wanted[number], part, depth + 1) for number, part in _parts(data) if number in wanted]
    return found


def _location(entry: memoryview) -> str | None:
    """The value of an entry whose key is ``location``; of a field that is there twice the last one counts."""
    parts = dict(_parts(entry))
    key, value = (bytes(parts.get(number, b"")) for number in (_KEY, _VALUE))
    return value.decode(errors="replace") if key == b"location" else None


def _parts(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, contents) of the length-delimited fields of a message, in order."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            size, at = _varint(data, at)
            if size > end - at:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + size]
            at += size
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
    if at != end:
        raise ValueError("the last field is cut off")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, place behind it)."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut off")
