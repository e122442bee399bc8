"""Backend names -> backends, imported only when asked for; ``auto`` takes the first that can run the bundle here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.runtime.backends.base import Backend
from vlmtrim.runtime.errors import RuntimeRefusal

BACKENDS = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")  # in the order in which auto tries them
AUTO = "auto"
ACTIVATIONS = ("int8", "float32")  # what ONNX Runtime multiplies packed weights by; the first is the default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--backend``, ``--threads`` and ``--activations`` of a command that answers."""
    parser.add_argument(
        "--backend", default=AUTO, choices=(AUTO, *BACKENDS), help="what runs it (default: the fastest here)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of ONNX Runtime (default: one per core)")
    parser.add_argument(
        "--activations",
        default=ACTIVATIONS[0],
        choices=ACTIVATIONS,
        help="what ONNX Runtime multiplies packed weights by (default int8; float32 is exact and slow)",
    )


def make_backend(name: str, threads: int = 0, cuda_graphs: str = "auto", activations: str = ACTIVATIONS[0]) -> Backend:
    """Create a backend. Raises RuntimeRefusal naming what is missing.

    Args:
        name: one of BACKENDS.
        threads: CPU threads of ONNX Runtime; 0 for its default, one per core.
        cuda_graphs: how TensorRT's decode steps are replayed: ``auto``, ``capture`` or ``off``.
        activations: of ACTIVATIONS; ``float32`` multiplies packed weights exactly, and slowly.
    """
    if name not in BACKENDS:
        raise RuntimeRefusal(f"backend {name!r} is not supported; supported: {', '.join((AUTO, *BACKENDS))}")
    if name.startswith("tensorrt"):
        from vlmtrim.runtime.backends.tensorrt import TrtBackend

        return TrtBackend(name, cuda_graphs)
    if cuda_graphs != "auto":
        raise RuntimeRefusal(f"--cuda-graphs is of the TensorRT backends, not of {name}; leave it out")
    from vlmtrim.runtime.backends.ort import OrtBackend

    return OrtBackend(name, threads, activations)


def choose_backend(
    name: str,
    bundle: Bundle,
    threads: int = 0,
    cuda_graphs: str = "auto",
    verbose: bool = False,
    activations: str = ACTIVATIONS[0],
) -> Backend:
    """Create a backend for a bundle; for ``auto`` the first that can run it. ``verbose`` says on stderr which, and why
    not the others.

    Raises:
        RuntimeRefusal: the backend that was asked for cannot start here, or none can run the bundle; says why.
    """
    if name != AUTO:
        return make_backend(name, threads, cuda_graphs, activations)
    passed_over = []
    for candidate in BACKENDS:
        try:
            backend = make_backend(candidate, threads, cuda_graphs, activations)
            backend.check(bundle.folder, bundle.contract)
        except RuntimeRefusal as refusal:
            passed_over.append(f"{candidate}: {_short(refusal, bundle.folder)}")
            continue
        if verbose:
            print(f"backend {candidate}" + "".join(f"; not {reason}" for reason in passed_over), file=sys.stderr)
        return backend
    raise RuntimeRefusal(f"no backend can run {bundle.folder} here ({'; '.join(passed_over)})")


def _short(refusal: RuntimeRefusal, folder: Path) -> str:
    """What is wrong, without what to do about it."""
    return str(refusal).split(";")[0].replace(f"{folder} ", "the bundle ")
