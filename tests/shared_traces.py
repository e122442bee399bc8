"""Traces that all tests share, over all test processes: tracing is most of what exporting a tiny model takes."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir


class SharedTraces:
    """In place of ``trace.trace``: what was traced of an equal plan, from a folder.

    Weights are placeholders of no memory that every export binds to its checkpoint anew; so is what is written here, in
    ONNX's own form for data in a file, which does not exist.
    """

    def __init__(self, folder: Path, real: Callable[[Any], ir.Model]):
        self._folder, self.real = folder, real
        self._loaded: dict[Path, ir.Model] = {}

    def __call__(self, plan: Any) -> ir.Model:
        path = self._folder / f"{hashlib.sha256(key(plan).encode()).hexdigest()[:24]}.onnx"
        if path not in self._loaded:
            if not path.is_file():
                self._write(path, self.real(plan))
            self._loaded[path] = ir.load(path)
        return self._loaded[path].clone()

    def _write(self, path: Path, model: ir.Model) -> None:
        for name, value in model.graph.initializers.items():
            stored = value.const_value
            if name.startswith("full.") and stored.size > 1 and not any(stored.raw.stride()):  # one number, expanded
                value.const_value = ir.ExternalTensor(
                    "nowhere", 0, stored.nbytes, value.dtype, shape=value.shape, name=name
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{id(self)}.partial")
        ir.save(model, partial)
        partial.rename(path)


def key(plan: Any) -> str:
    """All that a trace depends on, in words: modules, the model's config, example inputs and the boundary."""
    full = plan.module.full
    own = {name: value for name, value in vars(plan.module).items() if not name.startswith("_")}
    parameters = [(name, value.dtype, tuple(value.shape)) for name, value in full.named_parameters()]
    inputs = [(tuple(v.shape), v.dtype, v.tolist() if v.numel() < 65 else None) for v in flat(plan)]
    config = without(full.config.to_dict())
    told = (type(plan.module), own, type(full), config, parameters, inputs)
    return repr((*told, plan.dynamic_shapes, plan.spec, dict(plan.fusions)))


# Of a config, what no graph depends on: where it is from, how weights were stored, which token ends an answer.
UNSAID = ("_name_or_path", "quantization_config", "eos_token_id")


def without(config: Any) -> Any:
    """A config and those in it without UNSAID."""
    if not isinstance(config, dict):
        return config
    return {name: without(value) for name, value in config.items() if name not in UNSAID}


def flat(plan: Any) -> list[Any]:
    """Tensors among the example inputs."""
    import torch

    return [leaf for leaf in torch.utils._pytree.tree_leaves(list(plan.args)) if isinstance(leaf, torch.Tensor)]


def install(folder: Path) -> None:
    """Let exports share their traces, once the module that traces is there."""
    module = sys.modules.get("vlmtrim.export.tracing.trace")
    if module is not None and not isinstance(module.trace, SharedTraces):
        module.trace = SharedTraces(folder, module.trace)
        share_translations()


def share_translations() -> None:
    """One table of torch.onnx's translations a process: it makes one for every graph, a third of a small one's time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
