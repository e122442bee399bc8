"""What an export, its engines and its bundle will need, before any of it is done."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmtrim.export import weights
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.tracing.text_models import in_language_model
from vlmtrim.export.weights import taking
from vlmtrim.graphs.contract import DTYPE_BYTES, TOKENS, Contract
from vlmtrim.graphs.formats import Packing
from vlmtrim.graphs.packed import HEAD
from vlmtrim.graphs.staging import nearest_folder
from vlmtrim.graphs.surgery.shard import boundaries
from vlmtrim.runtime.measure.machine import free_memory

# Measured with scripts/bench_export.py: the process with torch and transformers and the trace of a 7B or 13B model.
EXPORT_BYTES = 0.7e9
# A cast holds one tensor as it is stored, as it is written, and what the check for overflow needs.
CAST_COPIES = 4
PACK_COPIES = 2.5  # of the largest matrix in float32: as it is stored, turned, and packed
# TensorRT-RTX 1.7: peak of a build over the weights of the engine (DESIGN, section 5).
BUILD_FACTOR = 3.2
PACKED_BUILD_FACTOR = 3.6  # the same of a 7B decoder in int4
# Share of the free memory that an engine build may plan with.
HEADROOM = 0.85
GRAPH_BYTES = 2e6  # ONNX files, contract, tokenizer


@dataclass(frozen=True)
class Plan:
    """Bytes, all of them.

    Attributes:
        weights: of the model in the bundle's dtype.
        decoder: the part of them in the decoder graph.
        vision: the part of them in the vision graph.
        taking: how the weights come into the bundle (:mod:`vlmtrim.export.weights.taking`).
        export: peak memory of the export without engines.
        shards: engines that the decoder is cut into; 0 where none is built.
        build: peak memory while engines are built; 0 where none is.
        disk: what the bundle adds on disk.
        free: on the disk that the bundle will lie on.
        dense_caches: of the unpruned model.
    """

    weights: int
    decoder: int
    vision: int
    taking: str
    export: int
    shards: int
    build: int
    disk: int
    free: int
    dense_caches: int

    @property
    def peak(self) -> int:
        """Memory that the whole job needs."""
        return max(self.export, self.build)


def make_plan(
    job: Job,
    contract: Contract,
    model: Any,
    tensors: Mapping[str, weights.StoredTensor] | None,
    packings: Mapping[str, Packing],
) -> Plan:
    """Plan for a model on the meta device or without memory.

    Args:
        packings: parameter -> how it is packed.
        tensors: of the checkpoint; None where its files are not at hand, and then they are taken to have the dtype
            that was asked for.

    Raises:
        Refusal: more memory is needed than ``--max-memory`` allows, the decoder cannot be cut as asked, or weights
            cannot be linked as asked.
    """
    _check_shards(job, contract)
    sizes = _sizes(model, contract.dtype, tensors, packings)
    total = sum(sizes.values())
    vision = sum(n for name, n in sizes.items() if not in_language_model(name) and "lm_head" not in name)
    embedding = sum(n for name, n in sizes.items() if "embed_tokens" in name)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    reads_embedding = tied and "lm_head.weight" not in packings
    decoder = total - vision - (0 if reads_embedding else embedding)
    where = nearest_folder(job.output)
    means, added = _taking(job, tensors, getattr(torch, contract.dtype), where, total, bool(packings))
    copies = PACK_COPIES if packings else CAST_COPIES
    most = max(parameter.numel() for parameter in model.parameters())
    export = EXPORT_BYTES + (0 if means != taking.WRITTEN else copies * most * 4)
    shards = build = 0
    if job.engine != "none":
        fewest = engine_shards(decoder, contract, memory_limit(job))
        shards = job.engine_shards or max(fewest, _least_shards(contract))
        largest = max(vision, embedding, largest_piece(decoder, contract, shards))
        build = int(build_factor(contract) * largest + EXPORT_BYTES)
    plan = Plan(
        weights=total,
        decoder=decoder,
        vision=vision,
        taking=means,
        export=int(export),
        shards=shards,
        build=build,
        disk=int(GRAPH_BYTES + added + (decoder + vision + embedding if shards else 0)),
        free=shutil.disk_usage(where).free,
        dense_caches=sum(
            dataclasses.replace(group, capacity=contract.dense_capacity(group)).nbytes(job.max_batch, contract.dtype)
            for group in contract.groups
        ),
    )
    if job.max_memory is not None and plan.peak > job.max_memory * 1e9:
        stage = "building the engines" if plan.build > plan.export else "the export"
        advice = "give more --engine-shards" if plan.build > plan.export else "keep the checkpoint's dtype"
        raise Refusal(
            f"{stage} needs about {plan.peak / 1e9:.1f} GB, --max-memory allows {job.max_memory:g} GB; {advice}, or "
            "give a larger --max-memory"
        )
    return plan


def _least_shards(contract: Contract) -> int:
    """TensorRT-RTX 1.7 (Myelin, "is_const") builds no engine that holds several selections, one behind the other, and
    int4_sum layers behind them; those of two pieces it does."""
    sums = any(kind.format == "int4_sum" for kind in contract.packed)
    return 2 if sums and sum(group.removed > 0 for group in contract.groups) > 1 else 1


def _sizes(
    model: Any, dtype: str, tensors: Mapping[str, weights.StoredTensor] | None, packings: Mapping[str, Packing]
) -> dict[str, int]:
    """Bytes of every parameter as it is stored; of a packed one that shares its tensor with another, too."""
    size = DTYPE_BYTES[dtype]
    own = weights.common_dtype(tensors).itemsize if tensors is not None and packings else size
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = {n: p.numel() * (min(size, own) if p.ndim > 1 else size) for n, p in model.named_parameters()}
    for name, packing in packings.items():
        outputs, inputs = parameters[name].shape
        sizes[name] = packing.nbytes(inputs, outputs, dtype)
    return sizes


def _taking(
    job: Job,
    tensors: Mapping[str, weights.StoredTensor] | None,
    dtype: torch.dtype,
    where: Path,
    total: int,
    packs: bool,
) -> tuple[str, int]:
    """How the weights come into the bundle, and the bytes that they add on its disk.

    Raises Refusal where files were to be linked, and others are written.
    """
    if packs or (tensors is not None and not weights.keeps_files(tensors, dtype)):
        if job.link_weights:
            why = "stored in another order" if packs else f"stored as {str(dtype).removeprefix('torch.')}"
            raise Refusal(f"--link-weights: weights are {why}, in files of their own; leave it out")
        return taking.WRITTEN, total
    if tensors is None:
        return (taking.LINKED, 0) if job.link_weights else (taking.COPIED, total)
    files = weights.files_of(tensors)
    means = taking.how(files, where, job.link_weights)
    return means, sum(file.stat().st_size for file in files) if means == taking.COPIED else 0


def check_disk(plan: Plan, output: str) -> None:
    """Raises Refusal where the bundle does not fit on its disk."""
    if plan.disk > plan.free:
        way = " or, where checkpoint and bundle lie on one file system, --link-weights" * (plan.taking == taking.COPIED)
        raise Refusal(
            f"the bundle needs about {plan.disk / 1e6:.1f} MB of disk, {nearest_folder(output)} has "
            f"{plan.free / 1e6:.1f} MB free; make room, or give another --output{way}"
        )


def _check_shards(job: Job, contract: Contract) -> None:
    layers = sum(len(group.layers) for group in contract.groups)
    if job.engine_shards > layers:
        raise Refusal(f"--engine-shards is {job.engine_shards}, the decoder has {layers} layers; give 1 to {layers}")


def build_factor(contract: Contract) -> float:
    """Peak memory of an engine's build over its weights."""
    return PACKED_BUILD_FACTOR if contract.packed else BUILD_FACTOR


def engine_shards(decoder: int, contract: Contract, limit: float) -> int:
    """Fewest engines of the decoder whose builds fit into ``limit`` bytes of memory, at most one a layer."""
    layers = sum(len(group.layers) for group in contract.groups)
    fits = (limit - EXPORT_BYTES) / build_factor(contract)
    return next((n for n in range(1, layers) if largest_piece(decoder, contract, n) <= fits), layers)


def largest_piece(decoder: int, contract: Contract, shards: int) -> float:
    """Bytes of weights of the largest engine where ``decoder`` bytes are cut into so many."""
    layers = sum(len(group.layers) for group in contract.groups)
    layer, tail = layer_bytes(decoder, contract)
    edges = [0, *boundaries(layers, shards, tail / layer), layers]
    return max(layer * (end - start) + (tail if end == layers else 0) for start, end in itertools.pairwise(edges))


def layer_bytes(decoder: int, contract: Contract) -> tuple[float, float]:
    """Bytes of one layer, and of what follows the last one (the matrix of the logits), of a decoder's weights."""
    spec = contract.graphs["decoder"]
    hidden, vocabulary = spec.inputs[0].shape[2], spec.outputs[0].shape[1]
    assert isinstance(hidden, int) and isinstance(vocabulary, int)
    packed = next((kind.nbytes for kind in contract.packed if kind.part == HEAD), None)
    tail = packed or hidden * vocabulary * DTYPE_BYTES[contract.dtype]
    return (decoder - tail) / sum(len(group.layers) for group in contract.groups), tail


def memory_limit(job: Job) -> float:
    """Bytes that engine builds may plan with: ``--max-memory``, else most of what is free now."""
    return job.max_memory * 1e9 if job.max_memory is not None else HEADROOM * free_memory()


def lines(plan: Plan, contract: Contract, batch: int, parameters: int) -> list[str]:
    """The plan for people, one line a figure."""
    megabytes = lambda size: f"{size / 1e6:10.1f} MB"  # noqa: E731
    origin = {
        taking.CLONED: "clones of the checkpoint's files",
        taking.COPIED: "copies of the checkpoint's files",
        taking.LINKED: "linked to the checkpoint's files",
        taking.WRITTEN: "written anew",
    }[plan.taking]
    out = [
        f"    weights      {megabytes(plan.weights)}  ({parameters / 1e6:.1f} M parameters, {contract.dtype}, {origin})"
    ]
    for kind in contract.packed:
        block = f"blocks of {kind.block}" if kind.block else "a scale a column"
        said = f"{kind.matrices} matrices, {kind.weights / 1e6:.1f} M weights, {kind.format}, {block}"
        out.append(f"    of it {kind.part:6} {megabytes(kind.nbytes)}  ({said})")
    pruned = 0
    for index, group in enumerate(contract.groups):
        size = group.nbytes(batch, contract.dtype)
        pruned += size
        filled = "tokens" if group.source == TOKENS else "image features"
        span = f"layers {group.layers[0]}-{group.layers[-1]}"
        if group.layers != tuple(range(group.layers[0], group.layers[-1] + 1)):
            span = f"{len(group.layers)} of {span}"
        held = f"{group.capacity} {filled}"
        if group.window:
            held = f"the last {group.window} of them and a step, {held}"
        out.append(f"    caches {index}     {megabytes(size)}  ({span}, {held}, batch {batch})")
    out.append(f"    caches       {megabytes(pruned)}  (unpruned: {plan.dense_caches / 1e6:.1f} MB)")
    out.append(f"    disk         {megabytes(plan.disk)}  (what the bundle adds; {plan.free / 1e6:.1f} MB are free)")
    out.append(f"    export       {megabytes(plan.export)}  of memory at its peak")
    if plan.shards:
        cut = "in one piece" if plan.shards == 1 else f"the decoder in {plan.shards} pieces"
        out.append(f"    engines      {megabytes(plan.build)}  of memory at their peak ({cut})")
    return out
