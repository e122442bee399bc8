"""Whether an ONNX Runtime multiplies by packed weights as they are, tried on a model of one matrix.

ONNX Runtime's optimiser fuses ``MatMul(x, DequantizeLinear(w))`` to one kernel, MatMulNBits. Where it does not, floats
are made of every weight at every step, which takes more time and memory than weights that were never packed. A session
does not say what it has fused, but saves the optimised graph.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.graphs.contract import ROUNDING, Packed
from vlmtrim.runtime.backends import handmade

KERNEL = b"MatMulNBits"
LEVEL = "session.qdq_matmulnbits_accuracy_level"  # what activations are multiplied in
UNSIGNED = "session.x64quantprecision"  # MatMulInteger by unsigned weights, with kernels that are slower where both are
_STORED = {"int4_zero": "int4", "int4_sum": "int4"}  # formats whose integers have another's dtype
_ZEROS = ("int4_zero",)  # formats whose DequantizeLinear has zero points
_INPUTS, _OUTPUTS = 64, 32


def fuses(ort: Any, provider: str, kind: Packed, dtype: str, entries: dict[str, str]) -> bool:
    """Whether a session of ``provider`` with these config entries multiplies by matrices that are packed so."""
    if kind.format in ROUNDING:  # in MatMulInteger, of which CUDA knows signed activations alone
        return provider == "CPUExecutionProvider"
    if _STORED.get(kind.format, kind.format) not in handmade.NUMBERS:
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


def saturates(ort: Any, provider: str, entries: dict[str, str]) -> bool:
    """Whether sums of products by signed integers are wrong on this processor: without VNNI, x86 kernels add up pairs
    of products in 16 bits, which do not hold the largest; see UNSIGNED."""
    options = ort.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(_integers(), options, providers=[provider])
    (sums,) = session.run(None, {"x": np.full((1, _INPUTS), 255, np.float32)})
    return bool((sums != 255 * 127 * _INPUTS).any())


def _integers() -> bytes:
    """A ModelProto of ``y = MatMulInteger(x, w)`` between casts, w full of 127."""
    weights = np.full((_INPUTS, _OUTPUTS), 127, np.int8).tobytes()
    graph = b"".join(
        (
            handmade.field(1, handmade.node("Cast", ["x"], "codes", {"to": handmade.NUMBERS["uint8"]})),
            handmade.field(1, handmade.node("MatMulInteger", ["codes", "w"], "sums", {})),
            handmade.field(1, handmade.node("Cast", ["sums"], "y", {"to": handmade.NUMBERS["float32"]})),
            handmade.field(5, handmade.tensor("w", "int8", (_INPUTS, _OUTPUTS), 8, weights)),
            handmade.field(11, handmade.value("x", "float32", (1, _INPUTS))),
            handmade.field(12, handmade.value("y", "float32", (1, _OUTPUTS))),
        )
    )
    return handmade.model(graph)


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
            handmade.field(1, handmade.node("DequantizeLinear", ["w", "scales", *zeros], "floats", layout)),
            handmade.field(1, handmade.node("MatMul", ["x", "floats"], "y", {})),
            handmade.field(5, handmade.tensor("w", stored, (inputs, _OUTPUTS), bits[stored])),
            handmade.field(5, handmade.tensor("scales", dtype, scales, bits.get(dtype, 16))),
            *(handmade.field(5, handmade.tensor(name, stored, scales, bits[stored])) for name in zeros),
            handmade.field(11, handmade.value("x", dtype, (1, inputs))),
            handmade.field(12, handmade.value("y", dtype, (1, _OUTPUTS))),
        )
    )
    return handmade.model(graph)
