"""Library behind export-vlm: complete a job, preview it, execute it."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import pipeline, weights
from vlmtrim.export.job import Job, Refusal
from vlmtrim.graphs.lint import node_counts
from vlmtrim.graphs.methods import make_method, parameters

DEFAULT_SEQ_LEN = 2048
_LENGTH_OF_THE_MODEL = 0  # stands in a job until the model's config is read


def make_job(args: argparse.Namespace) -> Job:
    """argv -> Job; what was left out is filled in from the method and, for the length, from the model."""
    fields = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Job)}
    fields = {name: value for name, value in fields.items() if value is not None}  # the others have defaults in Job
    if args.max_seq_len is None:
        fields["max_seq_len"] = _LENGTH_OF_THE_MODEL
    elif args.max_seq_len < 1:
        raise Refusal(f"--max-seq-len is {args.max_seq_len}; give 2 or more")
    try:
        method = make_method(args.method, **{name: getattr(args, name) for name in parameters(args.method)})
    except ValueError as error:
        raise Refusal(str(error)) from error
    fields["output"] = args.output or default_output(args.model, method.label if method else "dense")
    return Job(**{**fields, "method": method})


def default_output(model: str, label: str) -> str:
    """Folder name of a bundle where the user gives none."""
    stem = Path(model).name if Path(model).is_dir() else model.replace(":", "-").replace("/", "--")
    return str(Path("bundles") / f"{stem}-{label}")


def _with_length(job: Job, family: Any, config: Any) -> Job:
    if job.max_seq_len != _LENGTH_OF_THE_MODEL:
        return job
    return dataclasses.replace(job, max_seq_len=min(DEFAULT_SEQ_LEN, family.read_shape(config).max_positions))


def _read(job: Job, scratch: str, with_weights: bool) -> tuple[Job, Path, Any, Any]:
    source = checkpoints.resolve(job.model, Path(scratch), weights=with_weights)
    family, config = checkpoints.read_config(source)
    return _with_length(job, family, config), source, family, config


def execute(job: Job) -> Path:
    """Export; returns the bundle's folder."""
    with tempfile.TemporaryDirectory(prefix="vlmtrim-") as scratch:
        job, source, _, _ = _read(job, scratch, with_weights=True)
        return pipeline.export(job, source)


def dry_run(job: Job) -> str:
    """Job, contract, memory plan and operators as text; the graphs are traced, weights are neither read nor written."""
    with tempfile.TemporaryDirectory(prefix="vlmtrim-") as scratch:
        job, source, _, _ = _read(job, scratch, with_weights=False)
        has_weights = any(source.glob("*.safetensors"))
        prepared = pipeline.prepare(job, source, weights.read_checkpoint(source) if has_weights else None)
        if prepared.tensors is not None:
            weights.match_parameters(prepared.model, prepared.tensors)
        report: dict[str, Any] = {"stages": {}}
        nodes = {name: node_counts(graph) for name, graph in pipeline.graphs(prepared, report)}
    lines = ["job"]
    lines += [f"    {key:13} {value}" for key, value in job.fields().items()]
    for graph in prepared.contract.graphs.values():
        lines += [f"{graph.file}: inputs", pipeline.boundary_table(graph.inputs)]
        lines += [f"{graph.file}: outputs", pipeline.boundary_table(graph.outputs)]
    lines += ["sizes", *prepared.plan_lines, "operators"]
    for name, counts in nodes.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        lines += textwrap.wrap(
            f"{name}: {sum(counts.values())} nodes: {listed}", 110, initial_indent="    ", subsequent_indent=" " * 8
        )
    return "\n".join(lines)
