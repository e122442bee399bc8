"""Boundaries as the tables in :mod:`vlmtrim.graphs.contract` and :mod:`vlmtrim.graphs.keeping` state them.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmtrim.graphs.contract import DEEPSTACK, IMAGES, LAST_SEEN, CacheGroup, GraphSpec, TensorSpec, cache_names
from vlmtrim.graphs.keeping import COMPACT, POLICY, SCORE, CachePolicy

_ENDS = ("past_key_values", "present")


def decoder_spec(
    *,
    dtype: str,
    hidden: int,
    vocabulary: int,
    groups: tuple[CacheGroup, ...],
    selects: bool,
    position_axes: int = 1,
    guided: bool = False,
    emits: bool = False,
    query_heads: int = 0,
    rings: bool = False,
    deepstack: int = 0,
    sees_ahead: bool = False,
) -> GraphSpec:
    """The decoder's boundary as the table above states it; the exporter's lint holds the graph to it.

    ``position_axes``: numbers that a token's position consists of; more than 1 gives [position_axes, B, S].
    ``guided``: whether it selects by scores that it is given. ``emits``: whether it returns attention as such scores.
    ``query_heads``: heads of the queries that it returns (:mod:`vlmtrim.graphs.keeping`); 0 where it returns none.
    ``rings``: whether what tokens see is told apart from where they are written. ``deepstack``: first layers behind
    which features are added to visual tokens. ``sees_ahead``: whether visual tokens attend to those behind them.
    """
    inputs = [
        TensorSpec("inputs_embeds", dtype, ("B", "S", hidden)),
        TensorSpec("position_ids", "int64", ("B", "S") if position_axes == 1 else (position_axes, "B", "S")),
        TensorSpec("last_index", "int64", ("B",)),
    ]
    crosses = any(group.source == IMAGES for group in groups)
    outputs = [TensorSpec("logits", dtype, ("B", vocabulary))]
    if emits:
        inputs.append(TensorSpec("score_rows", "int64", ("B", "R")))
        inputs.append(TensorSpec("score_weights", "float32", ("B", "R")))
        outputs.append(TensorSpec("key_scores", "float32", ("B", "W0")))
    if crosses:
        inputs.append(TensorSpec("image_features", dtype, ("B", "N", hidden)))
        inputs.append(TensorSpec("image_numbers", "int64", ("B", "N")))
        inputs.append(TensorSpec("seen_images", "int64", ("B", "S", 2)))
    if crosses and selects:
        outputs.append(TensorSpec("kept_features", "int64", ("B", "Nk")))
        outputs.append(TensorSpec("kept_counts", "int64", ("B",)))
    elif any(group.chooses for group in groups):
        inputs.append(TensorSpec("visual_positions", "int64", ("B", "N")))
        for index in (index for index, group in enumerate(groups) if group.chooses):
            outputs.append(TensorSpec(f"kept_indices.{index}", "int64", ("B", f"Sk{index}")))
            outputs.append(TensorSpec(f"kept_counts.{index}", "int64", ("B",)))
    elif selects:
        inputs.append(TensorSpec("visual_positions", "int64", ("B", "N")))
        if guided:
            inputs.append(TensorSpec("guide_scores", "float32", ("B", "N")))
        outputs.append(TensorSpec("kept_indices", "int64", ("B", "Sk")))
        outputs.append(TensorSpec("visual_scores", "float32", ("B", "N")))
    if query_heads:
        inputs.append(TensorSpec("score_rows", "int64", ("B", "R")))
        for layer in range(sum(len(group.layers) for group in groups)):
            outputs.append(TensorSpec(f"score_queries.{layer}", dtype, ("B", query_heads, "R", groups[0].head_size)))
    inputs += [TensorSpec(DEEPSTACK, dtype, ("B", "S", deepstack * hidden))] * bool(deepstack)
    inputs += [TensorSpec(LAST_SEEN, "int64", ("B", "S"))] * sees_ahead
    _add_caches(inputs, outputs, groups, dtype, rings)
    return GraphSpec("decoder.onnx", tuple(inputs), tuple(outputs))


def _add_caches(
    inputs: list[TensorSpec], outputs: list[TensorSpec], groups: tuple[CacheGroup, ...], dtype: str, rings: bool
) -> None:
    for index, group in enumerate(groups):
        inputs.append(TensorSpec(f"write_indices.{index}", "int64", ("B",)))
        if group.source == IMAGES:
            inputs.append(TensorSpec(f"key_images.{index}", "int64", ("B", f"W{index}")))
        else:
            inputs.append(TensorSpec(f"key_positions.{index}", "int64", (f"W{index}",)))
        if rings:
            inputs.append(TensorSpec(f"query_limits.{index}", "int64", ("B",)))
        shape = ("B", group.kv_heads, group.capacity, group.head_size)
        for layer in group.layers:
            for past, present in cache_names(layer):
                inputs.append(TensorSpec(past, dtype, shape))
                outputs.append(TensorSpec(present, dtype, shape))


def shift_specs(groups: Sequence[CacheGroup], dtype: str) -> dict[str, GraphSpec]:
    """Boundaries of the graphs that move windows to the front, by name, as the contract states them."""
    specs = {}
    for group in groups:
        if group.window:
            shape = ("B", group.kv_heads, group.capacity, group.head_size)
            old, new = ([TensorSpec(f"{end}.{kind}", dtype, shape) for kind in ("key", "value")] for end in _ENDS)
            first = TensorSpec("first_kept", "int64", ("B",))
            specs[group.shift] = GraphSpec(f"{group.shift}.onnx", (first, *old), tuple(new))
    return specs


def compacts(groups: Sequence[CacheGroup]) -> tuple[str, ...]:
    """Names of the graphs that compact the groups' layers: one for every shape of caches."""
    shapes = [(group.kv_heads, group.capacity, group.head_size) for group in groups]
    numbers = {shape: index for index, shape in enumerate(dict.fromkeys(shapes))}
    return tuple(f"{COMPACT}-{numbers[shape]}" for shape in shapes)


def cache_specs(
    record: CachePolicy, groups: Sequence[CacheGroup], dtype: str, heads: int, sets: int, maps: int, merges: bool
) -> dict[str, GraphSpec]:
    """Boundaries of a policy's graphs by name, as the table above states them.

    Args:
        record: what the contract says of the policy.
        groups: all cache groups, filled by tokens, of one number of key heads and one head size.
        dtype: of caches and queries.
        heads: query heads.
        sets: of entries in a layer, X.
        maps: of scores, Z.
        merges: whether what goes is merged into what stays.
    """
    kv, size = groups[0].kv_heads, groups[0].head_size
    layers = sum(len(group.layers) for group in groups)
    drawn = record.seed is not None
    score = [TensorSpec("score_queries", dtype, ("B", heads, "R", size)), TensorSpec("row_slots", "int64", ("B", "R"))]
    score += [TensorSpec("key_kinds", "int64", ("B", "W"))]
    score += [TensorSpec("key_noise", "float32", ("B", "W")), TensorSpec("temperature", "float32", ())] * drawn
    score += [TensorSpec("past_key_values.key", dtype, ("B", kv, "C", size))]
    policy = (
        TensorSpec("key_scores", "float32", (layers, "B", maps, "W")),
        TensorSpec("key_kinds", "int64", (layers, "B", "W")),
        TensorSpec("share", "float32", ()),
    )
    chosen = TensorSpec("order", "int64", (layers, "B", sets, "W")), TensorSpec("counts", "int64", (layers, "B"))
    specs = {
        SCORE: GraphSpec("score.onnx", tuple(score), (TensorSpec("key_scores", "float32", ("B", maps, "W")),)),
        POLICY: GraphSpec("policy.onnx", policy, chosen),
    }
    for name, group in zip(record.compacts, groups, strict=True):
        shape = ("B", kv, group.capacity, size)
        feeds = [TensorSpec("order", "int64", ("B", sets, "M"))]
        feeds += [TensorSpec("counts", "int64", ("B",)), TensorSpec("key_kinds", "int64", ("B", "W"))] * merges
        caches = [[TensorSpec(f"{end}.{kind}", dtype, shape) for kind in ("key", "value")] for end in _ENDS]
        specs[name] = GraphSpec(f"{name}.onnx", (*feeds, *caches[0]), tuple(caches[1]))
    return specs


def cache_dims(groups: Sequence[CacheGroup], rows: int) -> dict[str, tuple[int, int]]:
    """(minimum, maximum) of the symbolic dims that a policy's graphs add."""
    capacities = [group.capacity for group in groups]
    return {
        "R": (0, rows),
        "C": (min(capacities), max(capacities)),
        "W": (1, max(capacities)),
        "M": (1, max(capacities)),
    }
