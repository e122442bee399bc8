"""The decoder's boundary as the table in :mod:`vlmtrim.graphs.contract` states it. Standard library only."""

from __future__ import annotations

from vlmtrim.graphs.contract import IMAGES, CacheGroup, GraphSpec, TensorSpec, cache_names


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
) -> GraphSpec:
    """The decoder's boundary as the table above states it; the exporter's lint holds the graph to it.

    ``position_axes``: numbers that a token's position consists of; more than 1 gives [position_axes, B, S].
    ``guided``: whether it selects by scores that it is given. ``emits``: whether it returns attention as such scores.
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
    for index, group in enumerate(groups):
        inputs.append(TensorSpec(f"write_indices.{index}", "int64", ("B",)))
        if group.source == IMAGES:
            inputs.append(TensorSpec(f"key_images.{index}", "int64", ("B", f"W{index}")))
        else:
            inputs.append(TensorSpec(f"key_positions.{index}", "int64", (f"W{index}",)))
        shape = ("B", group.kv_heads, group.capacity, group.head_size)
        for layer in group.layers:
            for past, present in cache_names(layer):
                inputs.append(TensorSpec(past, dtype, shape))
                outputs.append(TensorSpec(present, dtype, shape))
    return GraphSpec("decoder.onnx", tuple(inputs), tuple(outputs))
