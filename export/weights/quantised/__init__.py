"""Checkpoints that come quantised: one module a method; the file's name is the method's, with _ for -.

A method's module has

    matrices(settings, tensors)     (name, Quantised, suffixes) of every matrix, where ``<name>.<suffix>`` held it
    expected(settings)              what they will be, as far as the settings alone say

and its docstring's first line says what it takes. Settings are ``quantization_config`` of the checkpoint's
``config.json``. Nothing is quantised anew: integers, floats and scales are the checkpoint's own, in another order.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtrim.export.checkpoint import read_json
from vlmtrim.export.job import Refusal
from vlmtrim.export.weights.files import StoredTensor, match_parameters
from vlmtrim.export.weights.quantised.matrix import ADVICE, Quantised
from vlmtrim.graphs.formats import Packing, fitting_block

KEY = "quantization_config"
_SHARED = ("matrix", "unpacking")
_MARKS = (".qweight", ".weight_packed", ".weight_scale_inv")  # names that only packed matrices have


def method_names() -> list[str]:
    """Methods as ``quant_method`` names them, from the files there are; nothing is imported."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem not in _SHARED)
    return [name.replace("_", "-") for name in files]


def method_of(settings: Mapping[str, Any]) -> str:
    """The settings' method. Raises Refusal where it is none of :func:`method_names`."""
    method = settings.get("quant_method")
    if method not in method_names():
        raise Refusal(f"the checkpoint is quantised by {method!r}; taken are {', '.join(method_names())}: {ADVICE}")
    return str(method)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """``quantization_config`` of a checkpoint, at the top or of its text model; None where it comes in floats."""
    raw = read_json(folder / "config.json")
    text = raw.get("text_config")
    found = raw.get(KEY) or (text.get(KEY) if isinstance(text, dict) else None)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise Refusal(f"{folder / 'config.json'}: {KEY} is no object; download the checkpoint again")
    return found


def drop_settings(raw: dict[str, Any]) -> None:
    """Take the settings out of a config, in place: what a bundle holds is no longer packed so."""
    raw.pop(KEY, None)
    if isinstance(raw.get("text_config"), dict):
        raw["text_config"].pop(KEY, None)


def substitute(settings: Mapping[str, Any] | None, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors with one :class:`Quantised` in the place of what holds a matrix, ``<name>.weight``.

    Raises Refusal: an unknown method, or a matrix that DequantizeLinear cannot read.
    """
    if settings is None:
        packed = next((name for name in tensors if name.endswith(_MARKS)), None)
        if packed is not None:
            raise Refusal(
                f"{tensors[packed].file}: {packed} is of a packed matrix, but config.json has no {KEY}, which says by "
                f"what method; download the checkpoint again, or {ADVICE}"
            )
        return dict(tensors)
    replaced: dict[str, Quantised] = {}
    gone = set()
    for name, matrix, suffixes in _module(method_of(settings)).matrices(settings, tensors):
        parts = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in tensors]
        replaced[parts[0]] = matrix
        gone |= set(parts)
    if not replaced:
        raise Refusal(
            f"the checkpoint says that it is quantised by {settings['quant_method']}, and holds no matrix packed so; "
            f"download it again, or {ADVICE}"
        )
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if name in replaced:
            found[f"{name.rpartition('.')[0]}.weight"] = replaced[name]
        elif name not in gone:
            found[name] = tensor
    return found


def fit(model: Any, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, Packing]]:
    """What of the checkpoint's tensors the model has, and parameter -> how it comes packed.

    Raises Refusal where a packed matrix comes with a bias that the model does not have.
    """
    matched = match_parameters(model, tensors)
    known = set(matched.values())
    kept = {}
    for name, tensor in tensors.items():
        packed = tensors.get(f"{name.removesuffix('.bias')}.weight")
        if name not in known and name.endswith(".bias") and isinstance(packed, Quantised):
            if tensor.read().any():  # AutoGPTQ writes zeros for layers that have none
                raise Refusal(f"{tensor.file}: {name} is not zero, and the model's layer has no bias; {ADVICE}")
        else:
            kept[name] = tensor
    packings = {}
    for parameter, name in matched.items():
        tensor = tensors[name]
        if isinstance(tensor, Quantised):
            packings[parameter] = tensor.packing
    return kept, packings


def expected(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Packing]:
    """How matrices will come packed, before any weights are at hand: parameter -> packing.

    Args:
        shapes: of all linear layers of the model.
    """
    plan = _module(method_of(settings)).expected(settings)
    found = {}
    for name, (_, inputs) in shapes.items():
        block = fitting_block(plan.format, inputs, plan.block) if plan.covers(name) else None
        if block is not None:
            found[name] = Packing(plan.format, block)
    return found


def warn_of_activations(settings: Mapping[str, Any]) -> None:
    """Say on stderr that the settings of activations are left out, where there are any."""
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    asked = any(isinstance(group, dict) and group.get("input_activations") for group in groups)
    if asked or settings.get("activation_scheme") or settings.get("kv_cache_scheme"):
        print(
            f"warning: {method_of(settings)} of this checkpoint also says how activations or caches are quantised, "
            "which is left out: its weights alone are taken",
            file=sys.stderr,
        )


def _module(method: str) -> Any:
    return importlib.import_module(f"{__name__}.{method.replace('-', '_')}")
