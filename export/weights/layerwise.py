"""Calibrated packing: prompts with pictures run through the language model one layer at a time.

A layer is loaded, sees the prompts' states as the layers before it, already packed, give them, is packed by GPTQ
(:mod:`vlmtrim.export.weights.gptq`), and passes the states on; so one layer and its Hessians are in memory at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.weights.files import StoredTensor
from vlmtrim.export.weights.gptq import gptq
from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.formats import Packing, is_calibrated, load_format
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.image import load_image
from vlmtrim.runtime.progress import Progress
from vlmtrim.runtime.prompt import Prompter

LONGEST = 128  # prompts; more change little and cost memory (GPTQ's own number)
FLOAT16, NEAR = 65504.0, 0.5  # its largest value, and the share of it from which other pictures may pass it

Packer = Callable[[], tuple[np.ndarray, ...]]
Arguments = list[dict[str, Any]]  # of every layer, besides the states


class Weights:
    """Parameters of a model without memory, given to it and taken away again."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, StoredTensor], matched: Mapping[str, str]):
        self._model, self._tensors, self._matched = model, tensors, matched

    def load(self, names: Sequence[str]) -> None:
        """Read parameters as float32."""
        for name in names:
            self._put(name, self._tensors[self._matched[name]].read().to(torch.float32))

    def drop(self, names: Sequence[str]) -> None:
        """Free parameters; their shapes stay."""
        for name in names:
            self._put(name, torch.zeros(()).expand(self._model.get_parameter(name).shape))

    def _put(self, name: str, values: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self._model.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)


@torch.no_grad()
def pack(
    model: Any,
    weights: Weights,
    packings: Mapping[str, Packing],
    prompts: Sequence[Mapping[str, Tensor]],
    dtype: str,
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Packer], list[float]]:
    """Pack the matrices of a language model's layers on what its inputs are.

    Args:
        model: transformers' model without memory, in float32.
        packings: parameter -> how it is packed; what is no matrix of a layer, or not packed in integers, is left out.
        prompts: inputs of the model, as its own processor makes them.
        dtype: of the scales.
        folder: where packed layers wait.

    Returns:
        Parameter -> what reads its arrays; and the largest magnitude that anything in each layer takes.
    """
    text = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is text)
    outside = [name for name, _ in model.named_parameters() if not name.startswith((f"{prefix}.layers.", "lm_head"))]
    weights.load(outside)
    states = [_entering(model, text.layers, prompt) for prompt in prompts]
    weights.drop(outside)
    ready: dict[str, Packer] = {}
    largest: list[float] = []
    for index, layer in enumerate(text.layers):
        inside = f"{prefix}.layers.{index}"
        names = [f"{inside}.{name}" for name, _ in layer.named_parameters()]
        weights.load(names)
        chosen = {n: p for n, p in packings.items() if n in names and is_calibrated(p.format)}
        matrices = {name: layer.get_submodule(name[len(inside) + 1 :].rpartition(".")[0]) for name in chosen}
        arrays: dict[str, np.ndarray] = {}
        if chosen:
            file = folder / f"packed-{index}.safetensors"
            for name, hessian in _hessians(layer, index, matrices, states):
                packed = _pack(name, matrices[name], hessian, chosen[name], dtype)
                arrays |= packed
                ready[name] = _reader(file, list(packed))
            save_file(arrays, file)
        states, most = _passed(layer, index, states)
        largest.append(most)
        weights.drop(names)
        progress(index + 1, len(text.layers))
    return ready, largest


def say_ranges(largest: Sequence[float], job: Job) -> None:
    """Warn of layers whose values leave float16, or come near, where they are computed in it."""
    if not job.checks_ranges:
        return
    near = [i for i, most in enumerate(largest) if most > NEAR * FLOAT16 and i not in job.fp32_layers]
    if near:
        named = ",".join(map(str, sorted({*near, *job.fp32_layers})))
        print(
            f"warning: values of layers {', '.join(map(str, near))} reach {max(largest[i] for i in near):.3g}, float16 "
            f"ends at {FLOAT16:.0f}: export with --fp32-layers {named}, or with --dtype bfloat16 or float32",
            file=sys.stderr,
        )


def _entering(model: Any, layers: nn.ModuleList, prompt: Mapping[str, Tensor]) -> tuple[Tensor, Arguments]:
    """States [1, S, D] that enter the first layer, and the other arguments of each one, which may differ."""
    entered: list[Tensor] = []
    arguments: Arguments = []

    def note(hidden_states: Tensor, *_: Any, **given: Any) -> Tensor:
        entered.append(hidden_states)
        arguments.append(given)
        return hidden_states

    for layer in layers:
        layer.forward = note
    try:
        model.model(**prompt, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return entered[0], arguments


def _passed(
    layer: nn.Module, index: int, states: Sequence[tuple[Tensor, Arguments]]
) -> tuple[list[tuple[Tensor, Arguments]], float]:
    """States behind a layer, and the largest magnitude that it or a part of it read or returned."""
    most = [0.0]

    def watch(_: nn.Module, inputs: tuple, output: Any) -> None:
        for values in (*inputs, _states(output)):
            if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
                most[0] = max(most[0], float(values.abs().max()))

    handles = [module.register_forward_hook(watch) for module in layer.modules()]
    passed = [(_states(layer(hidden, **others[index])), others) for hidden, others in states]
    for handle in handles:
        handle.remove()
    return passed, most[0]


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _hessians(
    layer: nn.Module, index: int, matrices: Mapping[str, nn.Module], states: Sequence[tuple[Tensor, Arguments]]
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, sum of x x^T over all inputs [K, K]) of every matrix, a copy that may be overwritten. Matrices that
    read the same values, such as those of queries, keys and values, share one sum until then."""
    sums: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def watch(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0] is not last[0]:
                rows = args[0].reshape(-1, args[0].shape[-1])
                sums[name] = rows.t() @ rows if name not in sums else sums[name].addmm_(rows.t(), rows)
                last[:] = args[0], name
            owner[name] = last[1]

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in matrices.items()]
    for hidden, others in states:
        layer(hidden, **others[index])
    for handle in handles:
        handle.remove()
    last[0] = None
    for name in matrices:
        yield name, sums[owner[name]].clone()


def _pack(name: str, module: Any, hessian: Tensor, packing: Packing, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of a matrix, by name; the module goes on with what they stand for."""
    matrix = module.weight.t().contiguous()
    if not torch.isfinite(matrix).all() or not torch.isfinite(hessian).all():
        raise Refusal(f"{name}: weights or the states that it reads are not finite, so it cannot be calibrated")
    form = load_format(packing.format)
    low, high = form.LIMITS
    codes, scales = gptq(matrix, hessian, packing.block, dtype, low, high, form.SHRINK)
    module.weight.data = matrix.t()
    outputs, inputs = module.weight.shape
    described = packing.arrays(inputs, outputs, dtype)
    stored = form.from_codes(codes, scales)
    return {
        f"{name}.{array.suffix}": np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        for array, data in zip(described, stored, strict=True)
    }


def _reader(file: Path, names: Sequence[str]) -> Packer:
    def read() -> tuple[np.ndarray, ...]:
        with safe_open(file, "np") as arrays:
            return tuple(arrays.get_tensor(name) for name in names)

    return read


def prompts_of(source: Path, contract: Contract, asked: Sequence[tuple[Path, str]]) -> list[dict[str, Tensor]]:
    """What the model takes of pictures and questions, as the checkpoint's own processor makes it."""
    from vlmtrim.export.oracles.reference import own_processor, prepared

    if len(asked) > LONGEST:
        print(f"calibrating on the first {LONGEST} of {len(asked)} pictures", file=sys.stderr)
    prompter, processor = Prompter(Folder(source), contract), own_processor(source)
    found = []
    for picture, question in asked[:LONGEST]:
        parts: Any = [{"type": "image"}, {"type": "text", "text": question}]
        text = prompter.render([{"role": "user", "content": parts}]).text
        found.append(dict(prepared(processor, text, load_image(picture))))
    return found
