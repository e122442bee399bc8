"""The whole export as one list: checkpoint -> plan -> trace -> select -> weights -> save -> engines -> seal."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from vlmtrim.export import checkpoint as checkpoints
from vlmtrim.export import memory, trace, weights
from vlmtrim.export.attention import IMPLEMENTATION
from vlmtrim.export.flops import decoder_macs
from vlmtrim.export.job import Job, Refusal
from vlmtrim.graphs import shard
from vlmtrim.graphs.bundle import check_target, seal, staging
from vlmtrim.graphs.contract import IMAGES, CacheGroup, Contract, TensorSpec, decoder_spec
from vlmtrim.graphs.lint import lint, lint_chain, node_counts
from vlmtrim.graphs.methods import load_method, method_names, parameters
from vlmtrim.runtime.engines import build_engines, import_library

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
_DYNAMIC_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first graph is traced.

    ``tensors`` of the checkpoint are None where only its config is at hand; ``model`` has parameters without memory.
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

    @property
    def plan_lines(self) -> list[str]:
        """The memory plan for people."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return memory.lines(self.plan, self.contract, self.job.max_batch, parameters)


def export(job: Job, source: Path, traces: dict[str, ir.Model] | None = None) -> Path:
    """Run a job on the checkpoint in ``source``; returns the bundle's folder.

    ``traces`` serves many exports that differ in nothing but the selection: give every call the same dict, and the
    model is traced by the first call only.

    Raises Refusal, GraphError or FileExistsError; leaves nothing half done.
    """
    target = Path(job.output)
    check_target(target, job.force)
    if job.engine != "none":
        import_library(job.engine)  # minutes of work should not end in "not installed"
    report: dict[str, Any] = {"stages": {}, "nodes": {}}
    with staging(target, job.force) as folder:
        with _stage(report, "checkpoint"):
            prepared = prepare(job, source, weights.read_checkpoint(source))
            assert prepared.tensors is not None
            matched = weights.match_parameters(prepared.model, prepared.tensors)
        print("\n".join(prepared.plan_lines), file=sys.stderr, flush=True)
        contract = prepared.contract
        traced = dict(graphs(prepared, report, traces))
        for graph in traced.values():
            weights.check_bindings(graph, matched, prepared.tensors, prepared.dtype)
        with _stage(report, "weights"):
            stored = weights.store(
                prepared.tensors, prepared.dtype, folder, progress("weights"), job.copy_weights, job.clip_overflow
            )
        with _stage(report, "save"):
            for name, graph in traced.items():
                weights.bind(graph, matched, stored)
                lint(graph, contract.graphs[name], weights_bound=True)
                ir.save(graph, folder / contract.graphs[name].file)
                report["nodes"][name] = node_counts(graph)
        if prepared.plan.shards > 1:
            with _stage(report, "cut decoder"):
                contract = _cut(traced["decoder"], contract, prepared.plan.shards, folder)
        with _stage(report, "settings"):
            _copy_settings(source, folder, prepared.dtype)
            if hasattr(prepared.family, "adapt_settings"):
                prepared.family.adapt_settings(folder, contract)
            (folder / "contract.json").write_text(contract.to_json())
        if job.engine != "none":
            with _stage(report, f"engines ({job.engine})"):
                build_engines(folder, contract, job.engine)
        (folder / "job.json").write_text(_job_record(job, report))
        with _stage(report, "checksums"):
            seal(folder)
    return target


def prepare(job: Job, source: Path, tensors: dict[str, weights.StoredTensor] | None) -> Prepared:
    """Contract, model and memory plan of a job. Raises Refusal where the job fits neither model nor memory."""
    family, config = checkpoints.read_config(source)
    dtype = _dtype(job, config, tensors)
    contract = build_contract(job, family, config, dtype, source)
    model = trace.build_without_memory(family.MODEL_CLASS, config, dtype, IMPLEMENTATION)
    plan = memory.make_plan(job, contract, model, None if tensors is None else weights.bytes_by_dtype(tensors))
    return Prepared(job, source, family, config, tensors, dtype, contract, pruning_method(job), model, plan)


def graphs(
    prepared: Prepared, report: dict[str, Any], traces: dict[str, ir.Model] | None = None
) -> Iterator[tuple[str, ir.Model]]:
    """Every graph of the bundle with its selection and without weights, held to the contract."""
    contract, method, job = prepared.contract, prepared.method, prepared.job
    shape = prepared.family.read_shape(prepared.config)
    plain = contract.graphs["decoder"] if method is None else _plain_decoder(contract, prepared.config, prepared.family)
    for plan in prepared.family.plans(prepared.model, shape, prepared.dtype, plain):
        name = Path(plan.spec.file).stem
        with _stage(report, f"trace {name}"):
            graph = _traced(plan, traces)
            lint(graph, plan.spec)
        if name == "decoder" and method is not None:
            with _stage(report, f"select ({method.label})"):
                method(graph, visual_tokens=job.images * contract.image_tokens)
                lint(graph, contract.graphs[name])
        yield name, graph


def _cut(decoder: ir.Model, contract: Contract, pieces: int, folder: Path) -> Contract:
    """Write the decoder's chain beside it; returns the contract with its graphs."""
    layers = sum(len(group.layers) for group in contract.groups)
    layer, tail = memory.layer_bytes(shard.weight_bytes(decoder), contract)
    chain = shard.cut(decoder, shard.boundaries(layers, pieces, tail / layer))
    specs = shard.specs(chain, "decoder")
    lint_chain(specs, contract.graphs["decoder"])
    for graph, spec in zip(chain, specs, strict=True):
        ir.save(graph, folder / spec.file)
    named = {Path(spec.file).stem: spec for spec in specs}
    dims = dict(contract.dims)
    if contract.selection is not None and contract.crosses:
        dims["Nk"] = 0, max(group.capacity for group in contract.groups if group.source == IMAGES)
    elif contract.selection is not None:
        dims["Sk"] = dims["S"]
    return dataclasses.replace(
        contract, graphs={**contract.graphs, **named}, dims=dims, chains={"decoder": tuple(named)}
    )


def _traced(plan: trace.Plan, traces: dict[str, ir.Model] | None) -> ir.Model:
    if traces is None:
        return trace.trace(plan)
    if plan.spec.file not in traces:
        traces[plan.spec.file] = trace.trace(plan)
    return traces[plan.spec.file].clone()


def pruning_method(job: Job) -> Any:
    """The method a job names. Raises Refusal for an unknown one or for parameters out of range."""
    if job.method == "none":
        return None
    if job.method not in method_names():
        raise Refusal(f"method {job.method!r} is not supported; supported: {', '.join(method_names())}, none")
    method = load_method(job.method)
    try:
        return method(**{name: getattr(job, name) for name in parameters(job.method)})
    except ValueError as error:
        raise Refusal(str(error)) from error


def build_contract(job: Job, family: Any, config: Any, dtype: torch.dtype, source: Path) -> Contract:
    """The contract of a job's bundle, from the config alone. Raises Refusal where the job does not fit the model."""
    shape = _bounded(job, family.read_shape(config))
    method = pruning_method(job)
    _check_method(job, family)
    _check_limits(job, shape, config, family)
    name = str(dtype).removeprefix("torch.")
    capacity = job.max_seq_len
    dense = groups = dense_groups(shape, capacity, job.images)
    if method is not None:
        try:
            groups = method.groups(dense, job.images * shape.image_tokens)
        except ValueError as error:
            raise Refusal(str(error)) from error
    crosses = any(group.source == IMAGES for group in dense)
    least = min((group.length(0, shape.image_tokens) for group in groups if group.source == IMAGES), default=1)
    if least < 1:
        raise Refusal(
            f"the bound keeps none of a picture's {shape.image_tokens} features; give a larger --ratio, or a --bound "
            f"above 1 / {shape.image_tokens}"
        )
    most_images = job.images if crosses else max(1, capacity // shape.image_tokens)
    dims = {
        "B": (1, job.max_batch),
        "S": (1, capacity),
        # A picture of the sequence may bring less than image_tokens; every one for cross-attention brings as many.
        "N": (0, most_images * shape.image_tokens if crosses else capacity),
    }
    dims |= family.vision_dims(shape, most_images * job.max_batch)
    dims |= {f"W{index}": (1, group.capacity) for index, group in enumerate(groups)}
    decoder = decoder_spec(
        dtype=name,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        groups=groups,
        selects=method is not None,
        position_axes=shape.position_axes,
    )
    return Contract(
        family=family.__name__.rpartition(".")[2],
        dtype=name,
        graphs={
            "vision": family.vision_spec(shape, name),
            "embed": family.embed_spec(shape, name),
            "decoder": decoder,
        },
        groups=groups,
        dims=dims,
        selection=None if method is None else method.describe(),
        max_seq_len=capacity,
        images_assumed=job.images,
        image_tokens=shape.image_tokens,
        image_token_id=shape.image_token_id,
        image_grid=shape.image_grid,
        video_token_id=shape.video_token_id,
        eos_token_ids=_eos_ids(source, config),
        macs=decoder_macs(config.text_config),
        producer=f"vlmtrim {importlib.metadata.version('vlmtrim')}",
    )


def _bounded(job: Job, shape: Any) -> Any:
    """The shape with the visual tokens that the job allows a picture, where the family takes pictures of any size."""
    if not shape.any_size:
        if job.image_tokens:
            raise Refusal(f"--image-tokens bounds pictures of any size; this model's have {shape.image_tokens} tokens")
        return shape
    tokens = job.image_tokens or max(1, job.max_seq_len // (2 * job.images))  # half of the sequence is left to text
    return dataclasses.replace(shape, image_tokens=min(tokens, shape.image_tokens))


def dense_groups(shape: Any, capacity: int, images: int) -> tuple[CacheGroup, ...]:
    """Cache groups of the unpruned model: one of all layers, and one of the cross-attention layers where it has any."""
    cross: tuple[int, ...] = getattr(shape, "cross_layers", ())
    own = tuple(layer for layer in range(shape.layers) if layer not in cross)
    tokens = CacheGroup(own, capacity, shape.kv_heads, shape.head_size)
    if not cross:
        return (tokens,)
    features = images * shape.image_tokens
    return tokens, CacheGroup(cross, features, shape.kv_heads, shape.head_size, source=IMAGES)


def _check_method(job: Job, family: Any) -> None:
    proven = (*family.METHODS, "none")
    if job.method not in proven:
        name = family.__name__.rpartition(".")[2]
        raise Refusal(
            f"method {job.method} is not proven for the family {name}: no oracle and no test holds the two together "
            f"(export-vlm --list); give --method {' or '.join(proven)}"
        )


def _check_limits(job: Job, shape: Any, config: Any, family: Any) -> None:
    if job.max_batch < 1:
        raise Refusal(f"--max-batch is {job.max_batch}; give 1 or more")
    if job.images < 1:
        raise Refusal(f"--images is {job.images}; give 1 or more")
    if not 1 < job.max_seq_len <= shape.max_positions:
        raise Refusal(f"--max-seq-len is {job.max_seq_len}; the model takes 2 to {shape.max_positions} tokens")
    in_sequence = not getattr(shape, "cross_layers", ())
    if in_sequence and job.images * shape.image_tokens >= job.max_seq_len:
        raise Refusal(
            f"--max-seq-len {job.max_seq_len} does not hold {job.images} image(s) of {shape.image_tokens} tokens; "
            "give a larger --max-seq-len or fewer --images"
        )
    window = family.sliding_window(config)
    if window is not None and window < job.max_seq_len:
        raise Refusal(
            f"the model attends to a sliding window of {window} tokens, which selection does not support beyond the "
            f"window; give --max-seq-len {window} or less"
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _DYNAMIC_ROPE:
        raise Refusal(f"rope type {rope['rope_type']!r} depends on the length at run time, which a graph cannot hold")


def _plain_decoder(contract: Contract, config: Any, family: Any) -> Any:
    """Boundary of the decoder before the selection."""
    shape = family.read_shape(config)
    groups = dense_groups(shape, contract.max_seq_len, contract.images_assumed)
    return decoder_spec(
        dtype=contract.dtype,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        groups=groups,
        selects=False,
        position_axes=shape.position_axes,
    )


def _dtype(job: Job, config: Any, tensors: dict[str, weights.StoredTensor] | None) -> torch.dtype:
    if job.dtype != "auto":
        return getattr(torch, job.dtype)
    dtype = weights.common_dtype(tensors) if tensors is not None else config.dtype or torch.float32
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Refusal(f"the checkpoint is {dtype}; give --dtype float32, float16 or bfloat16")
    return dtype


def _eos_ids(source: Path, config: Any) -> tuple[int, ...]:
    ids: Any = None
    generation = source / "generation_config.json"
    if generation.is_file():
        ids = json.loads(generation.read_text()).get("eos_token_id")
    if ids is None:
        ids = config.text_config.eos_token_id
    if ids is None:
        raise Refusal(f"{source} names no eos_token_id in generation_config.json or config.json, so answers never end")
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


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
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _job_record(job: Job, report: dict[str, Any]) -> str:
    packages = ("vlmtrim", "torch", "transformers", "onnx", "onnx-ir")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return json.dumps({**job.fields(), "versions": versions, **report}, indent=2) + "\n"


@contextmanager
def _stage(report: dict[str, Any], name: str) -> Iterator[None]:
    """Time a stage; progress goes to stderr."""
    start = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield
    report["stages"][name] = round(time.perf_counter() - start, 3)


def progress(label: str) -> weights.Progress:
    """A progress line on stderr, at most one a percent."""
    last = -1

    def show(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done // max(total, 1)
        if percent != last and sys.stderr.isatty():
            last = percent
            end = "\n" if done >= total else ""
            print(f"\r{label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB ({percent} %)", end=end, file=sys.stderr)

    return show


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
