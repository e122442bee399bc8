"""One module a selection method; the file's name, with dashes, is the method's.

A method is a frozen dataclass whose fields are its flags (:func:`flag`), with ``name``, ``prunes``, ``label``,
``describe()``, ``groups(dense, visual_tokens)`` and ``__call__(model, visual_tokens, grid)``; its module names it
METHOD.
``prunes`` says what it removes, and so which families it is for: TOKENS, visual tokens of the sequence, or IMAGES,
features that cross-attention layers attend to; None, nothing, for families whose pictures are tokens. PATCHES are
removed in the vision graph, which is what such a method is called with (``__call__(model, patches)``); it says by
``image_tokens(patches)`` how many visual tokens a picture then is. A method that
ranks by ``guide_scores`` has ``guide``, who provides them (:mod:`vlmtrim.graphs.contract`). Its oracle is the file of
the same name in ``vlmtrim.export.oracles``.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any


def flag(default: Any, help: str, **settings: Any) -> Any:
    """A field of a method that is a flag of export-vlm; ``settings`` as argparse takes them, e.g. ``choices``."""
    kind = {} if default is None else {"type": type(default)}
    return dataclasses.field(default=default, metadata={**kind, "help": help, **settings})


def method_names() -> list[str]:
    """Names of the methods, from the files there are; nothing is imported."""
    files = Path(__file__).parent.glob("[!_]*.py")
    return sorted(path.stem.replace("_", "-") for path in files)


def load_method(name: str) -> Any:
    """The class of a method in :func:`method_names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").METHOD


def parameters(name: str) -> dict[str, dict[str, Any]]:
    """Names of a method's flags, each with its settings for argparse; none for ``none``, the unpruned model."""
    fields = () if name == "none" else dataclasses.fields(load_method(name))
    return {field.name: dict(field.metadata) for field in fields}


def make_method(name: str, **given: Any) -> Any:
    """The method of that name; None for ``none``. Raises ValueError where a parameter is out of range."""
    return None if name == "none" else load_method(name)(**given)
