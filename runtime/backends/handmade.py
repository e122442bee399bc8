"""Small ONNX models written by hand: a device has no onnx."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# ONNX's numbers of dtypes (onnx.TensorProto.DataType) and of an attribute that is an integer.
NUMBERS = {"float32": 1, "uint8": 2, "int8": 3, "float16": 10, "bfloat16": 16, "int4": 22}
_INT = 2


def model(graph: bytes) -> bytes:
    """A ModelProto of the fields of a graph, opset 24."""
    return number(1, 11) + field(7, graph + field(2, b"graph")) + field(8, field(1, b"") + number(2, 24))


def identity(dtype: str, shape: Sequence[int]) -> bytes:
    """A ModelProto of ``y = Identity(x)``."""
    ends = field(11, value("x", dtype, shape)) + field(12, value("y", dtype, shape))
    return model(field(1, node("Identity", ["x"], "y", {})) + ends)


def node(operator: str, inputs: Sequence[str], output: str, attributes: dict[str, int]) -> bytes:
    """A NodeProto whose attributes are integers."""
    made = [field(1, name.encode()) for name in inputs] + [field(2, output.encode()), field(4, operator.encode())]
    made += [field(5, field(1, n.encode()) + number(3, v) + number(20, _INT)) for n, v in attributes.items()]
    return b"".join(made)


def tensor(name: str, dtype: str, shape: Sequence[int], bits: int, data: bytes | None = None) -> bytes:
    """A TensorProto of these bytes, or of ones or of bits that stand for no number in particular."""
    dims = b"".join(number(1, size) for size in shape)
    data = np.ones(math.prod(shape) * bits // 32, np.float32).tobytes() if data is None else data
    return dims + number(2, NUMBERS[dtype]) + field(8, name.encode()) + field(9, data)


def value(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto."""
    dims = b"".join(field(1, number(1, size)) for size in shape)
    kind = field(1, number(1, NUMBERS[dtype]) + field(2, dims))
    return field(1, name.encode()) + field(2, kind)


def field(number: int, data: bytes) -> bytes:
    """Bytes under the number of a field."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def number(field_number: int, value: int) -> bytes:
    """An integer under the number of a field."""
    return _varint(field_number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
