"""Runs bundles. Never imports torch or transformers.

>>> import vlmtrim.runtime as vlmtrim
>>> chat = vlmtrim.open("bundles/tiny-llava-fastv-k2-r0.5", backend="ort-cpu")  # doctest: +SKIP
>>> for step in chat.generate("What is this?", ["cat.png"]):  # doctest: +SKIP
...     print(step.text, end="", flush=True)
"""

from __future__ import annotations

from pathlib import Path

from vlmtrim.graphs.bundle import BundleError, open_bundle
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.film import read_film
from vlmtrim.runtime.generate import Chat, Image, Prompt, Step
from vlmtrim.runtime.guided import Guided
from vlmtrim.runtime.progress import running
from vlmtrim.runtime.results import Prefill
from vlmtrim.runtime.sampling import Sampling
from vlmtrim.runtime.select_backend import BACKENDS, choose_backend, make_backend
from vlmtrim.runtime.session import Session
from vlmtrim.runtime.slots import Answer, Busy, Closed, Engine, Message, Request, State, Token
from vlmtrim.runtime.video import Video

__all__ = [
    "BACKENDS",
    "Answer",
    "BundleError",
    "Busy",
    "Chat",
    "Closed",
    "Engine",
    "Guided",
    "Image",
    "Message",
    "Prefill",
    "Prompt",
    "Request",
    "RuntimeRefusal",
    "Sampling",
    "Session",
    "State",
    "Step",
    "Token",
    "Video",
    "choose_backend",
    "make_backend",
    "open",
    "read_film",
]


def open(
    bundle: str | Path,
    backend: str = "ort-cpu",
    batch: int = 1,
    *,
    verify: bool = False,
    threads: int = 0,
    verbose: bool = False,
    activations: str = "int8",
) -> Chat:
    """Open a bundle on a backend; ``with`` closes it.

    Args:
        bundle: folder made by export-vlm.
        backend: one of BACKENDS, or ``auto`` for the first that can run it.
        batch: rows that run together.
        verify: hash every byte, also of large files that were hashed before and seem unchanged.
        threads: CPU threads of ONNX Runtime; 0 for one per core.
        activations: what ONNX Runtime multiplies packed weights by: ``int8``, or ``float32``, which is exact and slow.
        verbose: say on stderr which backend ``auto`` took, and why not the others.

    Raises BundleError for a damaged bundle, RuntimeRefusal where it cannot run.
    """
    with running("checking the bundle") as show:
        opened = open_bundle(bundle, verify, show)
    return Chat(
        Session(opened, choose_backend(backend, opened, threads, verbose=verbose, activations=activations), batch)
    )
