"""From what the user typed after --model to a folder with a Hugging Face checkpoint."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmtrim.export.job import Refusal
from vlmtrim.graphs.contract import IMAGES, PATCHES, TOKENS

DEMO = Path(__file__).parent / "demo" / "checkpoint"
SHIPPED = {"demo": DEMO, "demo-small": DEMO.parent / "small"}  # trained, small, in the package: work offline
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def family_names() -> list[str]:
    """Names of the families, from the files there are."""
    folder = Path(__file__).parent / "families"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def presets() -> dict[str, str]:
    """Preset -> hub id, as the families' files say (their PRESETS), without importing them."""
    named = {}
    for family in family_names():
        named |= ast.literal_eval(_assigned(family, "PRESETS"))
    return named


def published_sizes() -> dict[str, str]:
    """Size that a family can write a random checkpoint of (a key of its SIZES) -> the family, without importing any."""
    found = {}
    for family in family_names():
        sizes = _assigned(family, "SIZES")
        assert isinstance(sizes, ast.Dict)
        found |= {ast.literal_eval(key): family for key in sizes.keys if key is not None}
    return found


def load_family(name: str) -> ModuleType:
    """The family's module. Raises Refusal where there is none."""
    _check_family(name)
    return importlib.import_module(f"vlmtrim.export.families.{name}")


def _check_family(name: str) -> None:
    if name not in family_names():
        raise Refusal(f"model family {name!r} is not supported; supported: {', '.join(family_names())}")


def prunes(family: str) -> tuple[str, ...]:
    """What methods remove of a family's pictures (its PRUNES), without importing it. Raises Refusal."""
    kinds = {"TOKENS": TOKENS, "PATCHES": PATCHES, "IMAGES": IMAGES}
    return tuple(kinds[name.id] for name in ast.walk(_assigned(family, "PRUNES")) if isinstance(name, ast.Name))


def without(family: str) -> dict[str, str]:
    """Methods that do not go with a family, and why (its WITHOUT, where it says any), without importing it."""
    said = [node for node in _read_family(family).body if isinstance(node, ast.Assign)]
    found = next((node.value for node in said if ast.unparse(node.targets[0]) == "WITHOUT"), None)
    return {} if found is None else ast.literal_eval(found)


def tiny_layers(family: str) -> int:
    """Decoder layers of ``tiny:<family>``, without importing the family. Raises Refusal."""
    for node in _read_family(family).body:
        if isinstance(node, ast.FunctionDef) and node.name == "tiny_config":
            names = [argument.arg for argument in node.args.args][::-1]
            return ast.literal_eval(node.args.defaults[::-1][names.index("layers")])
    raise AssertionError(f"{family} has no tiny_config")


def _assigned(family: str, name: str) -> ast.expr:
    """What a family's file sets a constant to."""
    for node in _read_family(family).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return node.value
    raise AssertionError(f"{family} says no {name}")


def _read_family(name: str) -> ast.Module:
    """A family's file, parsed: importing it takes torch and transformers, and so seconds."""
    _check_family(name)
    return ast.parse((Path(__file__).parent / "families" / f"{name}.py").read_text())


def load_reference(family: str) -> Any:
    """The class that runs a family's unpatched model: of ``reference_<family>.py``, else of ``reference.py``."""
    own = f"reference_{family}"
    module = own if (Path(__file__).parent / "oracles" / f"{own}.py").is_file() else "reference"
    return importlib.import_module(f"vlmtrim.export.oracles.{module}").Reference


def resolve(model: str, scratch: Path, weights: bool = True) -> Path:
    """Folder of the checkpoint that ``model`` names: one of SHIPPED, preset, ``tiny:<family>``, folder or hub id.

    Args:
        scratch: where a tiny checkpoint is written.
        weights: False fetches only the small files of a hub checkpoint.
    """
    if model.startswith("tiny:"):
        from vlmtrim.export.weights.tiny import write_checkpoint

        return write_checkpoint(load_family(model.removeprefix("tiny:")), scratch / "checkpoint")
    if model in SHIPPED:
        return SHIPPED[model]
    if Path(model).is_dir():
        return Path(model)
    check_name(model)
    return _download(presets().get(model, model), weights)


def check_name(model: str) -> None:
    """Raises Refusal for a name that is nothing that a model may be; whether the hub has it is not asked."""
    if model.startswith("tiny:"):
        _check_family(model.removeprefix("tiny:"))
    elif not (model in SHIPPED or model in presets() or Path(model).is_dir() or _HUB_ID.fullmatch(model)):
        raise Refusal(
            f"model {model!r} is no preset ({', '.join((*SHIPPED, *presets()))}), "
            f"no tiny:<family> ({', '.join(family_names())}), no folder and no hub id (organisation/name)"
        )


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _HUB_FILES if weights else [p for p in _HUB_FILES if "safetensors" not in p]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub library raises many kinds; each means the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(
            f"could not download {hub_id} from the Hugging Face hub ({type(error).__name__}: {reason}); check the "
            "name and the connection, or download it elsewhere and give the folder"
        ) from error


def read_raw_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint of a family there is, as it stands. Raises Refusal."""
    path = folder / "config.json"
    if not path.is_file():
        raise Refusal(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    raw = read_json(path)
    _check_family(str(raw.get("model_type")))
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """The object that a settings file of a checkpoint holds. Raises Refusal."""
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise Refusal(f"{path} is no settings file: expected an object, found {type(raw).__name__}")
    return raw


def read_config(folder: Path) -> tuple[ModuleType, object]:
    """(family module, transformers config) of a checkpoint folder."""
    from transformers import AutoConfig

    family = load_family(read_raw_config(folder)["model_type"])
    return family, AutoConfig.from_pretrained(folder)
