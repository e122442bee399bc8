"""One module a selection method; the file's name, with dashes, is the method's.

A method is a frozen dataclass whose fields are its flags, with ``name``, ``label``, ``describe()``, ``groups(dense,
visual_tokens)`` and ``__call__(model, visual_tokens)``; its module names it METHOD.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any


def method_names() -> list[str]:
    """Names of the methods, from the files there are; nothing is imported."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(path.stem.replace("_", "-") for path in files if path.stem != "__init__")


def parameters(name: str) -> list[str]:
    """Names of a method's flags; none for ``none``, the unpruned model."""
    return [] if name == "none" else [field.name for field in dataclasses.fields(load_method(name))]


def load_method(name: str) -> Any:
    """The class of a method in :func:`method_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
