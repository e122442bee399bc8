"""Loading and saving of single graphs without touching their weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

# Initializers up to this size go into the ONNX file itself; 2 GiB is the limit of the whole file.
_INLINE_BYTES = 1 << 20


def load(path: str | Path) -> ir.Model:
    """Read an ONNX file; external weights stay on disk. Raises FileNotFoundError, or ValueError where it is no ONNX."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    try:
        return ir.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not a readable ONNX file: {error}") from error


def save(model: ir.Model, path: str | Path) -> None:
    """Write an ONNX file.

    Weights that already lie beside ``path`` are referred to; weights from any other folder are copied into
    ``<name>.data`` beside it, since loaders refuse external data outside the model's folder.
    """
    path = Path(path)
    foreign = any(
        isinstance(tensor := value.const_value, ir.ExternalTensor)
        and Path(tensor.base_dir).resolve() != path.parent.resolve()
        for value in model.graph.initializers.values()
    )
    if foreign:
        ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=_INLINE_BYTES)
    else:
        ir.save(model, path)
