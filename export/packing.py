"""Which matrices of a model are stored in fewer bits, and how: from the job to the graphs and the contract."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from vlmtrim.export.job import FLOAT, Job, Refusal
from vlmtrim.export.tracing.text_models import in_language_model
from vlmtrim.graphs.formats import Packing, fitting_block, load_format
from vlmtrim.graphs.packed import HEAD, LAYERS, TOWER, Packed
from vlmtrim.graphs.passes.quantise import quantise

# Projectors stay: they are small, and everything that the decoder sees of a picture passes them.
_PROJECTORS = ("multi_modal_projector", "merger", "connector")
_FULL = "full."  # what initializers of a traced graph begin with


def part_of(parameter: str) -> str | None:
    """What a matrix belongs to; None where it is part of a projector."""
    if parameter.startswith("lm_head"):
        return HEAD
    if in_language_model(parameter):
        return LAYERS
    return None if any(name in parameter for name in _PROJECTORS) else TOWER


def matrices_of(model: Any) -> dict[str, Any]:
    """Parameter of every linear layer -> its weight [N, K], on whatever device."""
    from torch import nn

    return {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def plan(job: Job, model: Any, given: Mapping[str, Packing]) -> dict[str, Packing]:
    """Parameter -> how it is packed, of all linear layers of a model (on the meta device) that the job asks for.

    Args:
        given: of matrices that the checkpoint holds packed; they stay as they are.

    Raises:
        Refusal: a pattern of ``--keep`` fits nothing, nothing is left to pack, or what is given would be packed anew.
    """
    matrices = matrices_of(model)
    _check_given(job, given, matrices)
    for pattern in job.keep:
        if not fnmatch.filter(matrices, pattern):
            raise Refusal(f"--keep {pattern} fits no matrix; they are named like {next(iter(matrices))}")
    formats = {LAYERS: job.weights, HEAD: job.head_format, TOWER: job.vision_weights, None: FLOAT}
    planned, left = {}, []
    for name, weight in matrices.items():
        chosen = formats[part_of(name)]
        wide = any(f".layers.{index}." in name for index in job.fp32_layers) and part_of(name) == LAYERS
        kept = wide or any(fnmatch.fnmatch(name, pattern) for pattern in job.keep)
        if name in given or chosen == FLOAT or kept:
            continue
        block = fitting_block(chosen, int(weight.shape[1]), _block(job, chosen))
        if block is None:
            left.append(name)
        else:
            planned[name] = Packing(chosen, block)
    if left:
        print(
            f"warning: {len(left)} matrices stay as they are, since no block divides their inputs (the first is "
            f"{left[0]}, {matrices[left[0]].shape[1]} inputs)",
            file=sys.stderr,
        )
    if job.packs and not planned:
        raise Refusal("no matrix is left to be stored in fewer bits; leave --weights out, or give a smaller --block")
    return {**(given if job.engine == "none" else {n: for_engines(p) for n, p in given.items()}), **planned}


def for_engines(packing: Packing) -> Packing:
    """The same matrix in a form that engines are built of: TensorRT reads no zero points but 0."""
    return Packing("int4_sum", packing.block) if packing.format == "int4_zero" else packing


def _check_given(job: Job, given: Mapping[str, Packing], matrices: Mapping[str, Any]) -> None:
    """Raise Refusal where matrices that come packed are not what the job and the model ask for."""
    other = next((name for name in given if name not in matrices), None)
    if other is not None:
        raise Refusal(f"{other} comes quantised, and is no matrix of a linear layer; give one that leaves it out")
    asked = {LAYERS: job.weights, HEAD: job.head_format, TOWER: job.vision_weights, None: FLOAT}
    if given and job.weights != FLOAT:
        raise Refusal(
            f"the checkpoint comes quantised, and --weights {job.weights} would quantise it again; leave it out, "
            "or give the checkpoint that is not quantised"
        )
    if given and job.fp32_layers:
        raise Refusal(
            "--fp32-layers needs weights in floats, and the checkpoint comes quantised; leave it out, or give the "
            "checkpoint that is not quantised"
        )
    for name in given:
        if asked[part_of(name)] != FLOAT:
            option = "--head-weights" if part_of(name) == HEAD else "--vision-weights"
            raise Refusal(f"{name} comes quantised; leave {option} out, or give the checkpoint that is not quantised")


def check_dtype(packings: Mapping[str, Packing], dtype: str) -> None:
    """Raise Refusal where formats for engines would be multiplied by float32."""
    for name, packing in packings.items():
        if load_format(packing.format).ENGINES_ONLY and dtype == "float32":
            raise Refusal(
                f"{name} is {packing.format}, for engines, which multiply it by float16 or bfloat16; "
                "give --dtype float16"
            )


def _block(job: Job, name: str) -> int:
    """The job's block where the format has it, else the format's own."""
    blocks = load_format(name).BLOCKS
    return blocks[0] if job.block is None or job.block not in blocks else job.block


def place(graph: ir.Model, planned: Mapping[str, Packing]) -> None:
    """Let a traced graph read those matrices that it has as planned, in place."""
    named = {f"{_FULL}{name}": packing for name, packing in planned.items()}
    quantise(graph, {name: packing for name, packing in named.items() if name in graph.graph.initializers})


def summary(placed: Mapping[str, Packing], model: Any, dtype: str) -> tuple[Packed, ...]:
    """What the contract says of them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kinds: dict[tuple[str, Packing], list[str]] = {}
    for name, packing in placed.items():
        part = part_of(name) or TOWER  # only checkpoints bring packed projectors, which lie in the vision graph
        kinds.setdefault((part, packing), []).append(name)
    found = []
    for (part, packing), names in kinds.items():
        shapes = [tuple(parameters[name].shape) for name in names]
        stored = sum(packing.nbytes(inputs, outputs, dtype) for outputs, inputs in shapes)
        weights = sum(outputs * inputs for outputs, inputs in shapes)
        found.append(Packed(part, packing.format, packing.block, len(names), weights, stored))
    return tuple(found)
