"""torch module -> onnx_ir model, without weights: parameters take no memory and become references later."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from torch import nn
from torch.fx.experimental import _config as sizes

from vlmtrim.export.tracing.settle import settle
from vlmtrim.graphs.contract import GraphSpec
from vlmtrim.graphs.passes.fuse import fuse

OPSET = 24


@dataclass(frozen=True)
class Plan:
    """One graph to trace.

    Attributes:
        module: holds the whole Hugging Face model as its attribute ``full``; parameters are named by it.
        args: example inputs, sizes >= 2 wherever a dimension is symbolic (torch specialises 0 and 1).
        dynamic_shapes: nested like ``args``, as torch.export takes it.
        spec: boundary of the graph; inputs and outputs are named by it, in order.
        fusions: operator -> how often the model's layers hold it, for :func:`vlmtrim.graphs.passes.fuse.fuse`.
    """

    module: nn.Module
    args: Sequence[Any]
    dynamic_shapes: Any
    spec: GraphSpec
    fusions: Mapping[str, int] = field(default_factory=dict)


def build_on_meta(model_class: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """An instance of a transformers model on the meta device: names and shapes of its parameters, nothing to run."""
    with torch.device("meta"):
        return model_class._from_config(config, attn_implementation=attention, dtype=dtype)


def build_without_memory(model_class: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """An instance of a transformers model whose parameters have their full shape and no memory (stride 0).

    Buffers that are computed from the config (rotary frequencies, position ids) are real. The recipe holds for
    any size: a 7B model costs a few megabytes.
    """
    model = build_on_meta(model_class, config, dtype, attention)
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.initialize_weights()  # fills the buffers; the parameters are still on the meta device
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return model.eval()


def trace(plan: Plan) -> ir.Model:
    """Trace a plan to opset 24 with the plan's names; weights are initializers named ``full.<parameter>``."""
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                model = _translated(plan, settle(_exported(plan)))
            except Exception:  # an operator without a translation, or a torch whose inner parts are others
                model = _translated(plan, plan.module, tuple(plan.args))
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)
    _name_boundary(model, plan.spec)
    tidy(model)
    fuse(model, plan.fusions)
    return model


def _exported(plan: Plan) -> torch.export.ExportedProgram:
    with sizes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # 0 and 1 are sizes like others
        return torch.export.export(
            plan.module,
            tuple(plan.args),
            dynamic_shapes=plan.dynamic_shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _translated(plan: Plan, *source: Any) -> ir.Model:
    """What torch.onnx makes of a program, or of a module and its arguments, which it decomposes."""
    program = torch.onnx.export(
        *source,
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        dynamic_shapes=plan.dynamic_shapes,
    )
    assert program is not None
    return program.model


def _name_boundary(model: ir.Model, spec: GraphSpec) -> None:
    for kind, values, tensors in (
        ("inputs", model.graph.inputs, spec.inputs),
        ("outputs", model.graph.outputs, spec.outputs),
    ):
        if len(values) != len(tensors):
            raise RuntimeError(f"{spec.file}: traced {len(values)} {kind}, the contract has {len(tensors)}")
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name


def tidy(model: ir.Model) -> None:
    """Fold small constants and drop what is unused.

    What reads a weight is never folded: the weights are placeholders, and large ones must not be copied.
    """
    from onnxscript.optimizer import fold_constants  # half a second, and a dry run traces nothing

    weights = {value for name, value in model.graph.initializers.items() if name.startswith("full.")}
    fold_constants(model, should_fold=lambda node: False if weights.intersection(node.inputs) else None)
    for tidy_pass in (
        common_passes.IdentityEliminationPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.RemoveUnusedNodesPass(),
    ):
        tidy_pass(model)
    model.metadata_props.clear()
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
