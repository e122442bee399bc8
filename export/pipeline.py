"""The whole export as one list: checkpoint -> plan -> trace -> select -> weights -> save -> engines -> seal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from vlmtrim.export import calibration, given, given_weights, memory, packing, prompt_form, weights
from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.job_contract import build_contract, plain_decoder
from vlmtrim.export.tracing import trace
from vlmtrim.export.tracing.attention import IMPLEMENTATION
from vlmtrim.export.weights import layerwise, quantised
from vlmtrim.graphs.bundle import seal
from vlmtrim.graphs.caching import cache_graphs
from vlmtrim.graphs.contract import IMAGES, PATCHES, VISION, Contract, GraphSpec, TensorSpec
from vlmtrim.graphs.formats import Packing
from vlmtrim.graphs.lint import lint, lint_chain, node_counts
from vlmtrim.graphs.passes.key_scores import key_scores
from vlmtrim.graphs.passes.last_row import last_row
from vlmtrim.graphs.passes.query_limits import query_limits
from vlmtrim.graphs.passes.score_queries import score_queries
from vlmtrim.graphs.passes.split_groups import split_groups
from vlmtrim.graphs.passes.vision_scores import vision_scores
from vlmtrim.graphs.passes.wide_layers import wide_layers
from vlmtrim.graphs.passes.widen import widen
from vlmtrim.graphs.reading import BundleError, Folder
from vlmtrim.graphs.shifting import shift_graphs
from vlmtrim.graphs.staging import check_target, staging
from vlmtrim.graphs.surgery import shard
from vlmtrim.runtime.engines import build_engines, import_library
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import load_processor
from vlmtrim.runtime.progress import Progress, running

# Files of a checkpoint that a bundle keeps: the runtime reads them, and the bundle stays a loadable checkpoint.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first graph is traced.

    ``tensors`` of the checkpoint are None where only its config is at hand; ``model`` is on the meta device. ``given``
    are those of the ``packings`` that the checkpoint comes with, and ``settings`` say how it was quantised.
    """

    job: Job
    source: Path
    family: Any
    config: Any
    tensors: dict[str, weights.StoredTensor] | None
    dtype: torch.dtype
    contract: Contract
    method: Any
    model: Any
    plan: memory.Plan
    packings: dict[str, Packing] = dataclasses.field(default_factory=dict)
    given: dict[str, Packing] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] | None = None

    @property
    def plan_lines(self) -> list[str]:
        """The memory plan for people."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return memory.lines(self.plan, self.contract, self.job.max_batch, parameters)


def export(
    job: Job, source: Path, traces: dict[str, ir.Model] | None = None, files: Mapping[str, str] | None = None
) -> Path:
    """Run a job on the checkpoint in ``source``; returns the bundle's folder. ``files`` are put into it as well.

    ``traces`` serves many exports that differ in nothing but the selection: give every call the same dict, and the
    model is traced by the first call only.

    Raises Refusal, GraphError or TargetError; leaves nothing half done.
    """
    target = Path(job.output)
    check_target(target, job.force)
    if job.engine != "none":
        import_library(job.engine)  # minutes of work should not end in "does not load"
    report: dict[str, Any] = {"stages": {}, "nodes": {}}
    with staging(target, job.force) as folder:
        with _stage(report, "checkpoint"):
            prepared = prepare(job, source, weights.read_checkpoint(source))
            assert prepared.tensors is not None
            matched = weights.match_parameters(prepared.model, prepared.tensors)
        print("\n".join(prepared.plan_lines), file=sys.stderr, flush=True)
        memory.check_disk(prepared.plan, job.output)
        traced = dict(graphs(prepared, report, traces))
        for graph in traced.values():
            weights.check_bindings(graph, matched, prepared.tensors, prepared.dtype)
        placed = _placed(traced, prepared.packings)
        contract = dataclasses.replace(
            prepared.contract, packed=packing.summary(placed, prepared.model, prepared.contract.dtype)
        )
        if prepared.settings is not None:
            report["quantised"] = prepared.settings["quant_method"]
        stored = _stored(prepared, matched, placed, folder, report)
        for name in job.given:
            with _stage(report, f"weights of the given {name}") as show:
                report[f"{name}_weights"] = given_weights.store(traced[name], name, folder, show, job.link_weights)
        with _stage(report, "save"):
            for name, graph in traced.items():
                widen(graph, weights.stored_dtypes(graph, matched, stored))
                weights.bind(graph, matched, stored)
                lint(graph, contract.graphs[name], weights_bound=True)
                ir.save(graph, folder / contract.graphs[name].file)
                report["nodes"][name] = node_counts(graph)
        if prepared.plan.shards > 1 or shard.picks_one_by_one(traced["decoder"]):
            with _stage(report, "cut decoder"):
                contract = _cut(traced["decoder"], contract, max(1, prepared.plan.shards), folder)
        with _stage(report, "settings"):
            _copy_settings(source, folder, prepared.dtype)
            if hasattr(prepared.family, "adapt_settings"):
                prepared.family.adapt_settings(folder, contract)
            for name, text in {"contract.json": contract.to_json(), **(files or {})}.items():
                (folder / name).write_text(text)
            if (problem := prompt_form.write_form(folder, contract, _video_mark(folder, contract))) is not None:
                print(f"no prompt.json ({problem}): C++ applications give token ids", file=sys.stderr)
        if job.engine != "none":
            with _stage(report, f"engines ({job.engine})"):
                build_engines(folder, contract, job.engine)
        (folder / "job.json").write_text(_job_record(job, report))
        with _stage(report, "checksums") as show:
            seal(folder, show)
    return target


def _video_mark(folder: Path, contract: Contract) -> str | None:
    """What templates write for a video, where the bundle's processor has words for it."""
    try:
        return load_processor(Folder(folder), contract).video_mark
    except (RuntimeRefusal, BundleError):  # the bundle's user is told
        return None


def prepare(job: Job, source: Path, tensors: dict[str, weights.StoredTensor] | None) -> Prepared:
    """Contract, model and memory plan of a job. Raises Refusal where the job fits neither model nor memory."""
    family, config = checkpoints.read_config(source)
    settings = quantised.read_settings(source)
    tensors = None if tensors is None else quantised.substitute(settings, tensors)
    dtype = _dtype(job, config, tensors)
    contract = build_contract(job, family, config, dtype, source)
    model = trace.build_on_meta(family.MODEL_CLASS, config, dtype, IMPLEMENTATION)
    tensors, given = _given(settings, model, tensors)
    packings = packing.plan(job, model, given)
    given = {name: packings[name] for name in given}
    packing.check_dtype(packings, contract.dtype)
    contract = dataclasses.replace(contract, packed=packing.summary(packings, model, contract.dtype))
    plan = memory.make_plan(job, contract, model, tensors, packings)
    if not contract.eos_token_ids:
        print(
            f"warning: {source} names no eos_token_id in generation_config.json or config.json, so answers end at "
            "their limit of tokens alone; --eos-token-id sets it",
            file=sys.stderr,
        )
    method = job.method
    return Prepared(
        job, source, family, config, tensors, dtype, contract, method, model, plan, packings, given, settings
    )


def _given(
    settings: dict[str, Any] | None, model: Any, tensors: dict[str, weights.StoredTensor] | None
) -> tuple[dict[str, weights.StoredTensor] | None, dict[str, Packing]]:
    """Tensors that the model has, and how matrices come packed; from the settings where no weights are."""
    if settings is None:
        return tensors, {}
    quantised.warn_of_activations(settings)
    if tensors is not None:
        return quantised.fit(model, tensors)
    shapes = {name: tuple(weight.shape) for name, weight in packing.matrices_of(model).items()}
    return None, quantised.expected(settings, shapes)


def graphs(
    prepared: Prepared, report: dict[str, Any], traces: dict[str, ir.Model] | None = None
) -> Iterator[tuple[str, ir.Model]]:
    """Every graph of the bundle with its selection and without weights, held to the contract."""
    contract, method, job = prepared.contract, prepared.method, prepared.job
    shape = prepared.family.read_shape(prepared.config)
    plain = plain_decoder(contract, prepared.config, prepared.family)
    foreign = _foreign(prepared, plain, report)
    model = trace.build_without_memory(prepared.family.MODEL_CLASS, prepared.config, prepared.dtype, IMPLEMENTATION)
    for plan in prepared.family.plans(model, shape, prepared.dtype, plain):
        name = Path(plan.spec.file).stem
        with _stage(report, f"{'take' if name in foreign else 'trace'} {name}"):
            graph = foreign[name] if name in foreign else _traced(plan, traces)
            if name == "decoder":
                last_row(graph)
            lint(graph, plan.spec)
            if name == "vision" and contract.guide == VISION:
                lint(vision_scores(graph, contract.image_tokens), contract.graphs[name])
        if name == "vision" and method is not None and method.prunes == PATCHES:
            with _stage(report, f"select ({method.label})"):
                lint(method(graph, patches=shape.image_tokens), contract.graphs[name])
        if name == "decoder" and job.cache is not None:
            with _stage(report, "return queries"):
                score_queries(graph)
        if name == "decoder" and method is not None and method.prunes != PATCHES:
            with _stage(report, f"select ({method.label})"):
                method(graph, visual_tokens=job.images * contract.image_tokens, grid=contract.whole_grid)
        apart = any(group.window for group in contract.groups) or (job.cache is not None and job.cache.by_layer)
        if name == "decoder" and apart:
            with _stage(report, "cache groups"):
                split_groups(graph, contract.groups)
        if name == "decoder" and job.cache is not None and job.cache.ring:
            query_limits(graph)
        if name == "decoder" and job.emit_guide:
            with _stage(report, "emit attention"):
                key_scores(graph)
        if name == "decoder":
            lint(graph, contract.graphs[name])
        packing.place(graph, prepared.packings)
        if name == "decoder" and job.fp32_layers:
            with _stage(report, "layers in float32"):
                wide_layers(graph, job.fp32_layers)
                lint(graph, contract.graphs[name])
        yield name, graph
    if job.cache is not None:
        assert contract.cache is not None
        with _stage(report, f"cache policy ({job.cache.name})"):
            specs = {name: contract.graphs[name] for name in contract.cache.graphs}
            made = cache_graphs(job.cache, specs)
        yield from made.items()
    yield from shift_graphs(contract.groups, contract.dtype).items()


def _foreign(prepared: Prepared, plain: GraphSpec, report: dict[str, Any]) -> dict[str, ir.Model]:
    """Graphs that the job names files of; ``plain`` is the decoder's boundary before any selection."""
    if not prepared.job.given:
        return {}
    with _stage(report, f"read {', '.join(prepared.job.given)}"):
        shape = prepared.family.read_shape(prepared.config)
        return dict(given.read(prepared.job, plain, prepared.contract, shape))


def _stored(
    prepared: Prepared, matched: dict[str, str], placed: dict[str, Packing], folder: Path, report: dict[str, Any]
) -> dict[str, weights.StoredTensor]:
    """Bring the weights into the bundle, packed as they are to be; returns where each tensor lies."""
    job = prepared.job
    assert prepared.tensors is not None
    with tempfile.TemporaryDirectory(prefix=".packed-", dir=folder) as waiting:
        ready: dict[str, layerwise.Packer] = {}
        if job.calibrates_weights or (job.checks_ranges and not prepared.given):
            with _stage(report, "calibrate weights") as show:
                ready, report["largest"] = _calibrated(prepared, matched, placed, Path(waiting), show)
            layerwise.say_ranges(report["largest"], job)
        with _stage(report, "weights") as show:
            packings = {**prepared.given, **placed}
            wanted = weights.Wanted(prepared.dtype, packings, matched, job.clip_overflow, ready)
            return weights.store(prepared.tensors, wanted, folder, show, job.link_weights)


def _calibrated(
    prepared: Prepared, matched: dict[str, str], placed: dict[str, Packing], waiting: Path, show: Progress
) -> tuple[dict[str, layerwise.Packer], list[float]]:
    """Matrices of the language model's layers, packed on the job's pictures; and the largest values of each layer."""
    assert prepared.tensors is not None and prepared.job.calibrate is not None
    family, config, contract = prepared.family, prepared.config, prepared.contract
    model = trace.build_without_memory(family.MODEL_CLASS, config, torch.float32, "sdpa")
    prompts = layerwise.prompts_of(prepared.source, contract, calibration.questions(Path(prepared.job.calibrate)))
    loader = layerwise.Weights(model, prepared.tensors, matched)
    return layerwise.pack(model, loader, placed, prompts, contract.dtype, waiting, show)


def _placed(traced: Mapping[str, ir.Model], planned: Mapping[str, Packing]) -> dict[str, Packing]:
    """Of the planned packings those of matrices that a graph reads; a tower's last layers may be read by none."""
    used = {name for graph in traced.values() for name in graph.graph.initializers}
    return {n: p for n, p in planned.items() if f"full.{n}.{p.format}" in used}


def _cut(decoder: ir.Model, contract: Contract, pieces: int, folder: Path) -> Contract:
    """Write the decoder's chain beside it; returns the contract with its graphs."""
    layers = sum(len(group.layers) for group in contract.groups)
    layer, tail = memory.layer_bytes(shard.weight_bytes(decoder), contract)
    alone = []
    if shard.picks_one_by_one(decoder):
        selection, decoder = shard.selection_apart(decoder)
        alone = [selection]
    chain = alone + shard.cut(decoder, shard.boundaries(layers, pieces, tail / layer))
    specs = shard.specs(chain, "decoder")
    lint_chain(specs, contract.graphs["decoder"])
    for graph, spec in zip(chain, specs, strict=True):
        ir.save(graph, folder / spec.file)
    named = {Path(spec.file).stem: spec for spec in specs}
    dims = dict(contract.dims)
    if contract.selection is not None and contract.crosses:
        dims["Nk"] = 0, max(group.capacity for group in contract.groups if group.source == IMAGES)
    elif contract.selection is not None:
        crossing = {str(dim) for spec in specs for tensor in spec.inputs for dim in tensor.shape}
        dims |= {dim: dims[{"Sk": "S", "Nk": "N"}[dim[:2]]] for dim in sorted(crossing) if dim[:2] in ("Sk", "Nk")}
    return dataclasses.replace(
        contract, graphs={**contract.graphs, **named}, dims=dims, chains={"decoder": tuple(named)}
    )


def _traced(plan: trace.Plan, traces: dict[str, ir.Model] | None) -> ir.Model:
    if traces is None:
        return trace.trace(plan)
    if plan.spec.file not in traces:
        traces[plan.spec.file] = trace.trace(plan)
    return traces[plan.spec.file].clone()


def _dtype(job: Job, config: Any, tensors: dict[str, weights.StoredTensor] | None) -> torch.dtype:
    if job.dtype != "auto":
        return getattr(torch, job.dtype)
    dtype = weights.common_dtype(tensors) if tensors is not None else config.dtype or torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Refusal(f"the checkpoint is {dtype}; give --dtype float32, float16 or bfloat16")
    return dtype


def _copy_settings(source: Path, folder: Path, dtype: torch.dtype) -> None:
    for name in SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for required in ("tokenizer.json", "preprocessor_config.json"):
        combined = required == "preprocessor_config.json" and (folder / "processor_config.json").is_file()
        if not (folder / required).is_file() and not combined:
            raise Refusal(f"{source} has no {required}; the runtime needs it (save the processor with save_pretrained)")
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    quantised.drop_settings(config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _job_record(job: Job, report: dict[str, Any]) -> str:
    packages = ("vlmtrim", "torch", "transformers", "onnx", "onnx-ir")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return json.dumps({**job.fields(), "versions": versions, **report}, indent=2) + "\n"


@contextmanager
def _stage(report: dict[str, Any], name: str) -> Iterator[Progress]:
    """Time a stage and say on stderr how long it took; gives what shows its progress."""
    start = time.perf_counter()
    if not sys.stderr.isatty():
        print(f"{name} ...", file=sys.stderr, flush=True)
    with running(name) as show:
        yield show
    report["stages"][name] = round(time.perf_counter() - start, 3)
    print(f"{name}: {report['stages'][name]:.1f} s", file=sys.stderr, flush=True)


def boundary_table(tensors: tuple[TensorSpec, ...]) -> str:
    """Names and shapes of a graph's inputs or outputs, caches summed up in one line."""
    lines, caches = [], []
    for tensor in tensors:
        shape = ", ".join(str(dim) for dim in tensor.shape)
        if tensor.name.startswith(("past_key_values", "present")):
            caches.append(f"[{shape}]")
        else:
            lines.append(f"    {tensor.name:20} {tensor.dtype:9} [{shape}]")
    for shape in dict.fromkeys(caches):
        lines.append(f"    {caches.count(shape):3} caches           {'':9} {shape}")
    return "\n".join(lines)
