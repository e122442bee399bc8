"""Backend names -> backends, imported only when asked for."""

from __future__ import annotations

from vlmtrim.runtime.backends.base import Backend
from vlmtrim.runtime.errors import RuntimeRefusal

BACKENDS = ("ort-cpu", "ort-cuda")


def make_backend(name: str, threads: int = 0) -> Backend:
    """Create a backend. Raises RuntimeRefusal naming what is missing.

    Args:
        threads: CPU threads of ONNX Runtime; 0 for its default, one per core.
    """
    if name not in BACKENDS:
        raise RuntimeRefusal(f"backend {name!r} is not supported; supported: {', '.join(BACKENDS)}")
    from vlmtrim.runtime.backends.ort import OrtBackend

    return OrtBackend(name, threads)
