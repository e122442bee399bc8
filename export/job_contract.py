"""A job and a checkpoint's config -> the contract of the bundle: cache groups, dims, limits, before any trace."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from vlmtrim.export.arguments import check_method
from vlmtrim.export.checkpoint import read_json
from vlmtrim.export.flops import decoder_macs
from vlmtrim.export.job import Job, Refusal, check_numbers
from vlmtrim.export.tracing.text_models import text_model
from vlmtrim.graphs.boundary import cache_dims, cache_specs, compacts, decoder_spec, shift_specs
from vlmtrim.graphs.contract import IMAGES, PATCHES, TOKENS, VISION, CacheGroup, Contract, GraphSpec, TensorSpec
from vlmtrim.graphs.keeping import CachePolicy
from vlmtrim.graphs.rules import GRID, PLACES, load_rule, rule_names

_DYNAMIC_ROPE = ("longrope",)
# Rows of a prompt whose attention is summed at most, the last ones: they cost rows x window x heads floats in a layer.
SCORED_ROWS = 256


def build_contract(job: Job, family: Any, config: Any, dtype: torch.dtype, source: Path) -> Contract:
    """The contract of a job's bundle, from the config alone. Raises Refusal where the job does not fit the model."""
    check_method(job, family.__name__.rpartition(".")[2])
    shape, method = _shape(job, family.read_shape(config)), job.method
    _check_limits(job, shape, config)
    name, capacity = str(dtype).removeprefix("torch."), job.max_seq_len
    groups = _groups(job, shape)
    crosses, guide = bool(shape.cross_layers), getattr(method, "guide", None)
    most_images = job.images if crosses else max(1, job.longest_step // shape.image_tokens)
    dims = {
        "B": (1, job.max_batch),
        "S": (1, job.longest_step),
        # A picture of the sequence may bring less than image_tokens; every one for cross-attention brings as many.
        "N": (0, most_images * shape.image_tokens if crosses else job.longest_step),
    }
    dims |= {"R": (0, min(SCORED_ROWS, capacity))} if job.emit_guide else {}
    dims |= {} if job.cache is None else cache_dims(groups, job.cache.count)
    dims |= family.vision_dims(shape, most_images * job.max_batch)
    dims |= {f"W{index}": (1, group.capacity) for index, group in enumerate(groups)}
    cache, heads = _cache_policy(job, groups), config.text_config.num_attention_heads
    decoder = decoder_spec(
        dtype=name,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        groups=groups,
        selects=method is not None and method.prunes in (TOKENS, IMAGES),
        position_axes=shape.position_axes,
        deepstack=shape.deepstack,
        sees_ahead=shape.sees_ahead,
        guided=guide is not None,
        emits=job.emit_guide,
        query_heads=0 if cache is None else heads,
        rings=cache is not None and cache.ring > 0,
    )
    contract = Contract(
        family=family.__name__.rpartition(".")[2],
        dtype=name,
        graphs={
            "vision": _vision_spec(family.vision_spec(shape, name), shape, method),
            "embed": family.embed_spec(shape, name),
            "decoder": decoder,
            **_cache_specs(job, cache, groups, name, heads),
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
        eos_token_ids=_eos_ids(job, source, config, shape.vocabulary),
        macs=decoder_macs(config.text_config),
        guide=guide,
        cache=cache,
        producer=f"vlmtrim {importlib.metadata.version('vlmtrim')}",
    )
    _check_needs(method, contract, shape.position_axes)
    return contract


def _cache_policy(job: Job, groups: tuple[CacheGroup, ...]) -> CachePolicy | None:
    """What the contract says of the job's cache policy."""
    policy = job.cache
    if policy is None:
        return None
    return CachePolicy(
        policy=policy.describe(),
        rows=policy.rows,
        count=policy.count,
        share=job.cache_share,
        compacts=compacts(groups),
        part=policy.part,
        candidates=policy.candidates,
        every=policy.interval,
        accumulates=policy.accumulates,
        ring=policy.ring,
        seed=policy.noise,
        temperatures=policy.temperatures,
    )


def _cache_specs(
    job: Job, record: CachePolicy | None, groups: tuple[CacheGroup, ...], dtype: str, heads: int
) -> dict[str, GraphSpec]:
    if record is None:
        return shift_specs(groups, dtype)
    kv = groups[0].kv_heads
    return cache_specs(record, groups, dtype, heads, job.cache.sets(kv), job.cache.maps(kv), job.cache.merges)


def _vision_spec(spec: GraphSpec, shape: Any, method: Any) -> GraphSpec:
    """The vision graph's boundary, with what its tower looks at where that ranks visual tokens. Raises Refusal."""
    if getattr(method, "guide", None) != VISION:
        return spec
    if len(spec.outputs[0].shape) != 3 or spec.outputs[0].shape[1] != shape.image_tokens:
        others = [name for name in rule_names() if not load_rule(name).NEEDS]
        raise Refusal(
            f"--score {method.score} ranks visual tokens by the vision tower's attention, patch by patch; this family "
            f"joins patches to tokens, or tiles to pictures, behind its tower: give one of {', '.join(others)}"
        )
    seen = TensorSpec("visual_attention", "float32", ("I", shape.image_tokens))
    return dataclasses.replace(spec, outputs=(*spec.outputs, seen))


def _check_needs(method: Any, contract: Contract, position_axes: int) -> None:
    """Refuse a score that needs to know where tokens lie on the picture where nothing tells."""
    needs = getattr(method, "needs", frozenset())
    if contract.whole_grid is not None or not needs & {GRID, PLACES}:
        return
    if GRID in needs or position_axes == 1:
        others = [name for name in rule_names() if not load_rule(name).NEEDS & {GRID, PLACES}]
        raise Refusal(
            f"--score {method.score} needs to know where tokens lie on the picture; pictures of the family "
            f"{contract.family} differ in their rows and columns: give one of {', '.join(others)}"
        )


def _shape(job: Job, shape: Any) -> Any:
    """A model's shape with the visual tokens that a picture is in the job's bundle. Raises Refusal."""
    shape = _bounded(job, shape)
    if job.method is None or job.method.prunes != PATCHES:
        return shape
    try:  # what is left of the patches lies on no grid
        return dataclasses.replace(shape, image_tokens=job.method.image_tokens(shape.image_tokens), image_grid=None)
    except ValueError as error:
        raise Refusal(str(error)) from error


def _bounded(job: Job, shape: Any) -> Any:
    """The shape with the visual tokens that the job allows a picture, where the family takes pictures of any size."""
    if not shape.any_size:
        if job.image_tokens:
            raise Refusal(f"--image-tokens bounds pictures of any size; this model's have {shape.image_tokens} tokens")
        return shape
    tokens = job.image_tokens or max(1, job.max_seq_len // (2 * job.images))  # half of the sequence is left to text
    return dataclasses.replace(shape, image_tokens=min(tokens, shape.image_tokens))


def _groups(job: Job, shape: Any) -> tuple[CacheGroup, ...]:
    """Cache groups of the job's model. Raises Refusal where the method does not fit."""
    groups = dense_groups(shape, job.max_seq_len, job.images)
    if job.method is not None:
        try:
            groups = job.method.groups(groups, job.images * shape.image_tokens)
        except ValueError as error:
            raise Refusal(str(error)) from error
    if job.cache is not None and job.cache.by_layer:
        groups = tuple(dataclasses.replace(group, layers=(layer,)) for group in groups for layer in group.layers)
    groups = _windowed(job, shape, groups)
    least = min((group.length(0, shape.image_tokens) for group in groups if group.source == IMAGES), default=1)
    if least < 1:
        raise Refusal(
            f"the bound keeps none of a picture's {shape.image_tokens} features; give a larger --ratio, or a --bound "
            f"above 1 / {shape.image_tokens}"
        )
    return groups


def _windowed(job: Job, shape: Any, groups: tuple[CacheGroup, ...]) -> tuple[CacheGroup, ...]:
    """The groups with layers that see a window alone apart, where their caches then are shorter."""
    near, capacity, made = set(shape.near_layers), shape.window + job.longest_step, []
    for group in groups:
        apart = tuple(layer for layer in group.layers if layer in near)
        if capacity >= group.capacity or not apart:
            made.append(group)
            continue
        made.append(dataclasses.replace(group, layers=apart, capacity=capacity, window=shape.window))
        if rest := tuple(layer for layer in group.layers if layer not in near):
            made.append(dataclasses.replace(group, layers=rest))
    return tuple(sorted(made, key=lambda group: group.layers[0]))


def dense_groups(shape: Any, capacity: int, images: int) -> tuple[CacheGroup, ...]:
    """Cache groups of the unpruned model: one of all layers, and one of the cross-attention layers where it has any."""
    cross = shape.cross_layers
    own = tuple(layer for layer in range(shape.layers) if layer not in cross)
    tokens = CacheGroup(own, capacity, shape.kv_heads, shape.head_size)
    if not cross:
        return (tokens,)
    features = images * shape.image_tokens
    return tokens, CacheGroup(cross, features, shape.kv_heads, shape.head_size, source=IMAGES)


def _check_limits(job: Job, shape: Any, config: Any) -> None:
    check_numbers(job)
    if not 1 < job.max_seq_len <= shape.max_positions:
        raise Refusal(f"--max-seq-len is {job.max_seq_len}; the model takes 2 to {shape.max_positions} tokens")
    if not shape.cross_layers and job.images * shape.image_tokens >= job.max_seq_len:
        raise Refusal(
            f"--max-seq-len {job.max_seq_len} does not hold {job.images} image(s) of {shape.image_tokens} tokens; "
            "give a larger --max-seq-len or fewer --images"
        )
    _check_step(job, shape)
    window = text_model(config).window(config.text_config)
    if window is not None and window < job.max_seq_len:
        raise Refusal(
            f"the model attends to a sliding window of {window} tokens, which selection does not support beyond the "
            f"window; give --max-seq-len {window} or less"
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _DYNAMIC_ROPE:
        raise Refusal(f"rope type {rope['rope_type']!r} depends on the length at run time, which a graph cannot hold")


def _check_step(job: Job, shape: Any) -> None:
    """Refuse a longest step that does not go with the model or the rest of the job."""
    longest = job.max_input_len
    if longest is None:
        return
    if not 0 < len(shape.near_layers) < shape.layers:
        raise Refusal(
            "--max-input-len shortens the caches of layers that see a sliding window beside others that see all, which "
            "this model has not; leave it out"
        )
    if not shape.image_tokens < longest <= job.max_seq_len:
        raise Refusal(
            f"--max-input-len is {longest}; give more than the {shape.image_tokens} tokens of a picture, up to "
            f"--max-seq-len, {job.max_seq_len}"
        )
    if job.cache is not None or job.emit_guide:
        what = "--emit-guide returns attention to" if job.cache is None else f"--cache {job.cache.name} judges"
        raise Refusal(
            f"{what} all entries of a conversation, and with --max-input-len some layers keep the last ones; leave one "
            "of them out"
        )


def plain_decoder(contract: Contract, config: Any, family: Any) -> Any:
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
        deepstack=shape.deepstack,
        sees_ahead=shape.sees_ahead,
    )


def _eos_ids(job: Job, source: Path, config: Any, vocabulary: int) -> tuple[int, ...]:
    """Tokens that end an answer: those of the job, else of the checkpoint; there may be none. Raises Refusal."""
    ids: Any = list(job.eos_token_ids) or None
    generation = source / "generation_config.json"
    if ids is None and generation.is_file():
        ids = read_json(generation).get("eos_token_id")
    if ids is None:
        ids = config.text_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids] * (ids is not None)
    if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
        raise Refusal(
            f"eos_token_id is {ids}, the model has tokens 0 to {vocabulary - 1}; give others by --eos-token-id"
        )
    return tuple(ids)
