"""Library behind export-vlm: complete a job, preview it, execute it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import pipeline
from vlmtrim.export.cli import default_output
from vlmtrim.export.job import Job, Refusal
from vlmtrim.graphs.contract import DTYPE_BYTES, Contract

DEFAULT_SEQ_LEN = 2048
_LENGTH_OF_THE_MODEL = 0  # stands in a job until the model's config is read


def make_job(args: argparse.Namespace) -> Job:
    """argv -> Job; what was left out is filled in from the method and, for the length, from the model."""
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Job) if hasattr(args, f.name)}
    if args.max_seq_len is None:
        fields["max_seq_len"] = _LENGTH_OF_THE_MODEL
    elif args.max_seq_len < 1:
        raise Refusal(f"--max-seq-len is {args.max_seq_len}; give 2 or more")
    method = pipeline.pruning_method(Job(**{**fields, "output": ""}))
    fields["output"] = args.output or default_output(args.model, method.label if method else "dense")
    return Job(**fields)


def _with_length(job: Job, family: Any, config: Any) -> Job:
    if job.max_seq_len != _LENGTH_OF_THE_MODEL:
        return job
    return dataclasses.replace(job, max_seq_len=min(DEFAULT_SEQ_LEN, family.read_shape(config).max_positions))


def _read(job: Job, scratch: str, weights: bool) -> tuple[Job, Path, Any, Any]:
    source = checkpoints.resolve(job.model, Path(scratch), weights=weights)
    family, config = checkpoints.read_config(source)
    return _with_length(job, family, config), source, family, config


def execute(job: Job) -> Path:
    """Export; returns the bundle's folder."""
    with tempfile.TemporaryDirectory(prefix="vlmtrim-") as scratch:
        job, source, _, _ = _read(job, scratch, weights=True)
        return pipeline.export(job, source)


def dry_run(job: Job) -> str:
    """Job, contract and expected sizes as text; reads the config, never the weights."""
    import torch

    with tempfile.TemporaryDirectory(prefix="vlmtrim-") as scratch:
        job, source, family, config = _read(job, scratch, weights=False)
        name = job.dtype if job.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
        contract = pipeline.build_contract(job, family, config, getattr(torch, name), source)
        with torch.device("meta"):
            model = family.MODEL_CLASS(config)
        parameters = sum(math.prod(p.shape) for p in model.parameters())
    lines = ["job"]
    lines += [f"    {key:12} {value}" for key, value in dataclasses.asdict(job).items()]
    for graph in contract.graphs.values():
        lines += [f"{graph.file}: inputs", pipeline.boundary_table(graph.inputs)]
        lines += [f"{graph.file}: outputs", pipeline.boundary_table(graph.outputs)]
    lines += ["sizes", *sizes(contract, parameters, job.max_batch)]
    return "\n".join(lines)


def sizes(contract: Contract, parameters: int, batch: int) -> list[str]:
    """Expected sizes, one line each: weights, caches by group, dense against pruned."""
    weight_bytes = parameters * DTYPE_BYTES[contract.dtype]
    lines = [f"    weights      {weight_bytes / 1e6:10.1f} MB  ({parameters / 1e6:.1f} M parameters, {contract.dtype})"]
    pruned = dense = 0
    for index, group in enumerate(contract.groups):
        size = group.nbytes(batch, contract.dtype)
        pruned += size
        dense += dataclasses.replace(group, capacity=contract.max_seq_len).nbytes(batch, contract.dtype)
        span = f"layers {group.layers[0]}-{group.layers[-1]}"
        lines.append(f"    caches {index}     {size / 1e6:10.1f} MB  ({span}, {group.capacity} tokens, batch {batch})")
    lines.append(f"    caches       {pruned / 1e6:10.1f} MB  (unpruned: {dense / 1e6:.1f} MB)")
    return lines
