"""Library behind export-vlm: complete a job, preview it, execute it."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import Any

from vlmtrim.export import calibration, pipeline, weights
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.arguments import LENGTH_OF_THE_MODEL
from vlmtrim.export.job import Job
from vlmtrim.graphs.lint import node_counts
from vlmtrim.graphs.staging import scratch

DEFAULT_SEQ_LEN = 2048


def _with_length(job: Job, family: Any, config: Any) -> Job:
    if job.max_seq_len != LENGTH_OF_THE_MODEL:
        return job
    return dataclasses.replace(job, max_seq_len=min(DEFAULT_SEQ_LEN, family.read_shape(config).max_positions))


def _read(job: Job, scratch: Path, with_weights: bool) -> tuple[Job, Path, Any, Any]:
    source = checkpoints.resolve(job.model, scratch, weights=with_weights)
    family, config = checkpoints.read_config(source)
    return _with_length(job, family, config), source, family, config


def execute(job: Job) -> Path:
    """Export; returns the bundle's folder."""
    with scratch() as folder:
        job, source, _, _ = _read(job, folder, with_weights=True)
        traces: dict[str, Any] = {}
        files: dict[str, str] = {}
        same = job.dtype == "float32"  # what was traced for measuring serves the bundle where the dtype is its own
        for measures, calibrate, name in (
            (calibration.measures_shares, calibration.calibrate_shares, calibration.SHARES),
            (calibration.measures_bounds, calibration.calibrate, calibration.FILE),
        ):
            if measures(job):
                job, files[name] = calibrate(job, lambda plain: pipeline.export(plain, source, traces), folder)
        return pipeline.export(job, source, traces if files and same else None, files)


def dry_run(job: Job, operators: bool = False) -> str:
    """Job, contract and memory plan as text; weights are neither read nor written.

    ``operators``: also the operators of every graph, which takes a trace.
    """
    nodes: dict[str, dict[str, int]] = {}
    with scratch() as folder:
        job, source, _, _ = _read(job, folder, with_weights=False)
        has_weights = any(source.glob("*.safetensors"))
        prepared = pipeline.prepare(job, source, weights.read_checkpoint(source) if has_weights else None)
        if prepared.tensors is not None:
            weights.match_parameters(prepared.model, prepared.tensors)
        if operators:
            report: dict[str, Any] = {"stages": {}}
            nodes = {name: node_counts(graph) for name, graph in pipeline.graphs(prepared, report)}
    lines = ["job"]
    lines += [f"    {key:13} {value}" for key, value in job.fields().items()]
    for graph in prepared.contract.graphs.values():
        lines += [f"{graph.file}: inputs", pipeline.boundary_table(graph.inputs)]
        lines += [f"{graph.file}: outputs", pipeline.boundary_table(graph.outputs)]
    lines += ["sizes", *prepared.plan_lines, *(["operators"] if operators else [])]
    for name, counts in nodes.items():
        listed = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        lines += textwrap.wrap(
            f"{name}: {sum(counts.values())} nodes: {listed}", 110, initial_indent="    ", subsequent_indent=" " * 8
        )
    return "\n".join(lines)
