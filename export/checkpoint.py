"""From what the user typed after --model to a folder with a Hugging Face checkpoint."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmtrim.export.job import Refusal

PRESETS = {
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-next-llama3-8b": "llava-hf/llama3-llava-next-8b-hf",
    "llama-3.2-11b-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama-3.2-90b-vision": "meta-llama/Llama-3.2-90B-Vision-Instruct",
}
DEMO = Path(__file__).parent / "demo" / "checkpoint"  # trained, small, in the package: works offline
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def family_names() -> list[str]:
    """Names of the families, from the files there are."""
    folder = Path(__file__).parent / "families"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def load_family(name: str) -> ModuleType:
    """The family's module. Raises Refusal where there is none."""
    if name not in family_names():
        raise Refusal(f"model family {name!r} is not supported; supported: {', '.join(family_names())}")
    return importlib.import_module(f"vlmtrim.export.families.{name}")


def load_reference(family: str) -> Any:
    """The class that runs a family's unpatched model: of ``reference_<family>.py``, else of ``reference.py``."""
    own = f"reference_{family}"
    module = own if (Path(__file__).parent / "oracles" / f"{own}.py").is_file() else "reference"
    return importlib.import_module(f"vlmtrim.export.oracles.{module}").Reference


def resolve(model: str, scratch: Path, weights: bool = True) -> Path:
    """Folder of the checkpoint that ``model`` names: ``demo``, preset, ``tiny:<family>``, folder or hub id.

    Args:
        scratch: where a tiny checkpoint is written.
        weights: False fetches only the small files of a hub checkpoint.
    """
    if model.startswith("tiny:"):
        from vlmtrim.export.weights.tiny import write_checkpoint

        return write_checkpoint(load_family(model.removeprefix("tiny:")), scratch / "checkpoint")
    if model == "demo":
        return DEMO
    if Path(model).is_dir():
        return Path(model)
    hub_id = PRESETS.get(model, model)
    if not _HUB_ID.fullmatch(hub_id):
        raise Refusal(
            f"model {model!r} is no preset (demo, {', '.join(PRESETS)}), "
            f"no tiny:<family> ({', '.join(family_names())}), no folder and no hub id (organisation/name)"
        )
    return _download(hub_id, weights)


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


def read_config(folder: Path) -> tuple[ModuleType, object]:
    """(family module, transformers config) of a checkpoint folder."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise Refusal(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise Refusal(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise Refusal(f"{path} is no Hugging Face config: expected an object, found {type(raw).__name__}")
    model_type = raw.get("model_type")
    family = load_family(str(model_type))
    return family, AutoConfig.from_pretrained(folder)
