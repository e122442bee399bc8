"""Whether an ONNX Runtime multiplies by packed weights as they are, tried on a model of one matrix.

ONNX Runtime's optimiser fuses ``MatMul(x, DequantizeLinear(w))`` to one kernel, MatMulNBits. Where it does not, floats
are made of every weight at every step, which takes more time and memory than weights that were never packed. A session
does not say what it has fused, but saves the optimised graph.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import Packed

KERNEL = b"MatMulNBits"
LEVEL = "session.qdq_matmulnbits_accuracy_level"  # what activations are multiplied in
# ONNX's numbers of dtypes (onnx.TensorProto.DataType) and of an attribute that is an integer.
_NUMBERS = {"float32": 1, "int8": 3, "float16": 10, "bfloat16": 16, "int4": 22}
_INT = 2
_STORED = {"int4_zero": "int4", "int4_sum": "int4"}  # formats whose integers have another's dtype
_ZEROS = ("int4_zero",)  # formats whose DequantizeLinear has zero points
_OUTPUTS = 32


def fuses(ort: Any, provider: str, kind: Packed, dtype: str, entries: dict[str, str]) -> bool:
    """Whether a session of ``provider`` with these config entries multiplies by matrices that are packed so."""
    if _STORED.get(kind.format, kind.format) not in _NUMBERS:
        return False
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        for name, value in entries.items():
            options.add_session_config_entry(name, value)
        try:
            ort.InferenceSession(_model(kind, dtype), options, providers=[provider])
            return KERNEL in Path(options.optimized_model_filepath).read_bytes()
        except Exception:  # of any kind: a library that cannot even open it does not fuse it
            return False


def _model(kind: Packed, dtype: str) -> bytes:
    """A ModelProto of ``y = MatMul(x, DequantizeLinear(w, scales))``, written by hand: a device has no onnx."""
    inputs = 2 * kind.block or 128
    scales = (inputs // kind.block, _OUTPUTS) if kind.block else (_OUTPUTS,)
    layout = {"axis": 0, "block_size": kind.block} if kind.block else {"axis": 1}
    bits = {"int4": 4, "int8": 8, "float32": 32}
    stored = _STORED.get(kind.format, kind.format)
    zeros = ["zeros"] if kind.format in _ZEROS else []
    graph = b"".join(
        (
            _field(1, _node("DequantizeLinear", ["w", "scales", *zeros], "floats", layout)),
            _field(1, _node("MatMul", ["x", "floats"], "y", {})),
            _field(2, b"probe"),
            _field(5, _tensor("w", stored, (inputs, _OUTPUTS), bits[stored])),
            _field(5, _tensor("scales", dtype, scales, bits.get(dtype, 16))),
            *(_field(5, _tensor(name, stored, scales, bits[stored])) for name in zeros),
            _field(11, _value("x", dtype, (1, inputs))),
            _field(12, _value("y", dtype, (1, _OUTPUTS))),
        )
    )
    return _number(1, 11) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 24))


def _node(operator: str, inputs: Sequence[str], output: str, attributes: dict[str, int]) -> bytes:
    made = [_field(1, name.encode()) for name in inputs] + [_field(2, output.encode()), _field(4, operator.encode())]
    made += [_field(5, _field(1, n.encode()) + _number(3, v) + _number(20, _INT)) for n, v in attributes.items()]
    return b"".join(made)


def _tensor(name: str, dtype: str, shape: Sequence[int], bits: int) -> bytes:
    dims = b"".join(_number(1, size) for size in shape)
    data = np.ones(math.prod(shape) * bits // 32, np.float32).tobytes()
    return dims + _number(2, _NUMBERS[dtype]) + _field(8, name.encode()) + _field(9, data)


def _value(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _number(1, size)) for size in shape)
    kind = _field(1, _number(1, _NUMBERS[dtype]) + _field(2, dims))
    return _field(1, name.encode()) + _field(2, kind)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
