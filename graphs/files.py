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
    ``<name>.data`` beside it, since loaders refuse external data outside the model's folder. Raises ValueError where
    those are hard-linked.
    """
    path = Path(path)
    external = [
        v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    ]
    foreign = [tensor for tensor in external if Path(tensor.base_dir).resolve() != path.parent.resolve()]
    if not foreign:
        ir.save(model, path)
        return
    for file in sorted({Path(tensor.path) for tensor in foreign}):
        if file.stat().st_nlink > 1:
            raise ValueError(
                f"{file} is hard-linked, and the ONNX libraries do not read such weights: save to {file.parent}, where "
                f"they are referred to, or copy the file first (export-vlm without --link-weights copies it)"
            )
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    if data.is_file() and not data.stat().st_size:  # all of them are in the ONNX file itself
        data.unlink()
