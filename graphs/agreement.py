"""Holds the parts of a contract against each other, so that what a runtime allocates and runs is one coherent model.

The schema (:mod:`vlmtrim.graphs.contract`) bounds single values; here are the promises between them. That the graphs
keep them is for the backends to check, on what they opened. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmtrim.graphs.boundary import cache_specs, compacts, decoder_spec, shift_specs
from vlmtrim.graphs.contract import DEEPSTACK, LAST_SEEN, TOKENS, VISION, Contract, GraphSpec, TensorSpec
from vlmtrim.graphs.keeping import POLICY
from vlmtrim.graphs.reading import BundleError, is_plain_name, shown

WHOLE = ("vision", "embed", "decoder")
LONGEST = 400  # characters of what is said of a contradiction


def check(contract: Contract, where: str = "contract.json") -> None:
    """Raise BundleError naming ``where`` and the first promise that another one contradicts."""
    for rule in (_graphs, _groups, _guide, _decoder, _cache, _shifts, _embed, _vision, _dims, _pictures):
        for problem in rule(contract):
            said = " ".join(problem.split())  # names in it are a stranger's
            said = said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
            raise BundleError(f"{where}: {said}; export the model again")


def _graphs(contract: Contract) -> Iterator[str]:
    for name in WHOLE:
        if name not in contract.graphs:
            yield f"graphs has no {name}"
    files = [spec.file for spec in contract.graphs.values()]
    for file in files:
        if not is_plain_name(file) or not file.endswith(".onnx"):
            yield f"a graph lies in {shown(file)}; expected a plain name that ends in .onnx"
    if len(set(files)) < len(files):
        yield "two graphs lie in one file"
    for name, spec in contract.graphs.items():
        for tensors in (spec.inputs, spec.outputs):
            if len({tensor.name for tensor in tensors}) < len(tensors):
                yield f"graphs.{name} names a tensor twice"
    for whole, pieces in contract.chains.items():
        if whole not in WHOLE or not pieces or any(piece not in contract.graphs for piece in pieces):
            yield f"chains.{whole} names a graph that graphs does not have"
            return
        problem = chain_problem([contract.graphs[piece] for piece in pieces], contract.graphs[whole])
        if problem is not None:
            yield f"chains.{whole}: {problem}"


def chain_problem(chain: Sequence[GraphSpec], whole: GraphSpec) -> str | None:
    """What keeps a chain of graphs from taking and returning what the whole graph does, and nothing else.

    Every input is one of the whole graph's, or an output of an earlier graph with the same dtype and shape.
    """
    outside = {tensor.name: tensor for tensor in whole.inputs}
    produced: dict[str, TensorSpec] = {}
    used: set[str] = set()
    for spec in chain:
        for tensor in spec.inputs:
            if (produced.get(tensor.name) or outside.get(tensor.name)) != tensor:
                return f"{spec.file}: no earlier graph and no input of {whole.file} provides {tensor}"
            used.add(tensor.name)
        for tensor in spec.outputs:
            if tensor.name in produced:
                return f"{spec.file}: {tensor.name} is returned by two graphs of the chain"
            produced[tensor.name] = tensor
    for tensor in whole.outputs:
        if produced.get(tensor.name) != tensor:
            return f"no graph of the chain returns {tensor}"
    if left := sorted(set(outside) - used):
        return f"no graph of the chain reads {left[0]}"
    if extra := sorted(set(produced) - used - {tensor.name for tensor in whole.outputs}):
        return f"{extra[0]} is returned by a graph of the chain and read by none"
    return None


def _groups(contract: Contract) -> Iterator[str]:
    layers = sorted(layer for group in contract.groups for layer in group.layers)
    if not layers or layers != list(range(len(layers))) or not all(group.layers for group in contract.groups):
        yield "groups do not hold every layer once"
    if not any(group.source == TOKENS and not group.window for group in contract.groups):
        yield "no group is filled by tokens and holds all of them"
    selects = any(tensor.name == "kept_indices" for tensor in contract.graphs["decoder"].outputs)
    for index, group in enumerate(contract.groups):
        if group.source == TOKENS and group.capacity > contract.max_seq_len:
            yield f"groups[{index}].capacity is {group.capacity}, max_seq_len {contract.max_seq_len}"
        if group.removed and not selects:
            yield f"groups[{index}].removed is {group.removed:g}, and the decoder selects nothing"
        if group.chooses and (group.source != TOKENS or len(group.layers) > 1 or group.removed):
            yield f"groups[{index}] chooses and is not one layer that is filled by tokens"
        if group.most < 1 and group.source == TOKENS and not group.chooses:
            yield f"groups[{index}].most is {group.most:g}, and it chooses nothing"
        if group.window and (group.source != TOKENS or group.chooses or contract.cache is not None):
            yield f"groups[{index}].window is {group.window}, of layers whose caches are cut by something else"
        if not set(group.sparse) <= set(group.layers) or bool(group.sparse) != bool(group.attends):
            yield f"groups[{index}].sparse is {list(group.sparse)}, attending to {group.attends} entries"
        if group.removed >= 1 or group.most <= 0:
            yield f"groups[{index}] keeps nothing of a picture"


def _guide(contract: Contract) -> Iterator[str]:
    takes = any(tensor.name == "guide_scores" for tensor in contract.graphs["decoder"].inputs)
    if takes and contract.guide is None:
        yield "the decoder takes guide_scores, and guide does not say who provides them"
    emits = any(tensor.name == "key_scores" for tensor in contract.graphs["decoder"].outputs)
    if emits and (contract.removes or contract.crosses or any(group.window for group in contract.groups)):
        yield "the decoder returns key_scores, and does not hold all visual tokens"
    if not takes and contract.guide is not None:
        yield f"guide is {shown(contract.guide)}, and the decoder takes no guide_scores"


def _decoder(contract: Contract) -> Iterator[str]:
    """The decoder's boundary follows from the groups and four numbers; those are read off it, the rest must match."""
    spec = contract.graphs["decoder"]
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    hidden, vocabulary = _width(inputs.get("inputs_embeds")), _width(outputs.get("logits"))
    positions = inputs.get("position_ids")
    axes = positions.shape[0] if positions is not None and len(positions.shape) == 3 else 1
    if hidden is None or vocabulary is None or not isinstance(axes, int):
        yield "the decoder has no inputs_embeds, position_ids or logits of a fixed width"
        return
    added = _width(inputs.get(DEEPSTACK))
    expected = decoder_spec(
        dtype=contract.dtype,
        hidden=hidden,
        vocabulary=vocabulary,
        groups=contract.groups,
        selects=bool(outputs.keys() & {"kept_indices", "kept_features"}),
        position_axes=axes,
        guided=contract.guide is not None,
        emits="key_scores" in outputs,
        query_heads=_query_heads(contract),
        rings=contract.cache is not None and contract.cache.ring > 0,
        deepstack=(added or 0) // hidden,
        sees_ahead=LAST_SEEN in inputs,
    )
    for kind, found, wanted in (
        ("inputs", spec.inputs, expected.inputs),
        ("outputs", spec.outputs, expected.outputs),
    ):
        if len(found) != len(wanted):
            yield f"the decoder has {len(found)} {kind}; its groups need {len(wanted)}"
        for have, want in zip(found, wanted, strict=False):
            if have != want:
                yield f"the decoder has among its {kind} {_said(have)} where its groups need {_said(want)}"
    for token in contract.eos_token_ids:
        if token >= vocabulary:
            yield f"eos_token_ids holds {token}, the decoder returns logits of {vocabulary} tokens"


def _query_heads(contract: Contract) -> int:
    """Heads of the queries that the decoder returns; 0 where it returns none."""
    queries = next((t for t in contract.graphs["decoder"].outputs if t.name == "score_queries.0"), None)
    size = queries.shape[1] if queries is not None and len(queries.shape) == 4 else 0
    return size if isinstance(size, int) else 0


def _cache(contract: Contract) -> Iterator[str]:
    """The boundaries of a cache policy's graphs follow from the groups and from three sizes, read off them."""
    record, heads = contract.cache, _query_heads(contract)
    if record is None:
        if heads:
            yield "the decoder returns score_queries, and no cache policy reads them"
        return
    if contract.crosses or not heads:
        yield "a cache policy needs visual tokens of the sequence, and score_queries of the decoder"
        return
    if any(name not in contract.graphs for name in record.graphs) or record.compacts != compacts(contract.groups):
        yield "graphs does not have what the cache policy runs"
        return
    chosen, compact = contract.graphs[POLICY], contract.graphs[record.compacts[0]]
    sets, maps = (
        tensor.shape[2] if len(tensor.shape) == 4 else None for tensor in (chosen.outputs[0], chosen.inputs[0])
    )
    if not isinstance(sets, int) or not isinstance(maps, int):
        yield "the cache policy's graph has no key_scores or order of fixed sizes"
        return
    merges = any(tensor.name == "counts" for tensor in compact.inputs)
    for name, spec in cache_specs(record, contract.groups, contract.dtype, heads, sets, maps, merges).items():
        if contract.graphs[name] != spec:
            yield f"graphs.{name} is not what its cache policy needs"
    if contract.dims.get("R", (0, 0)) != (0, record.count):
        yield f"dims.R is not 0 to the {record.count} rows of the cache policy"


def _shifts(contract: Contract) -> Iterator[str]:
    for name, spec in shift_specs(contract.groups, contract.dtype).items():
        if contract.graphs.get(name) != spec:
            yield f"graphs.{name} is not what caches with a window need"


def _embed(contract: Contract) -> Iterator[str]:
    hidden = _width(contract.graphs["decoder"].inputs[0])
    assert hidden is not None  # checked with the decoder
    width, added = contract.feature_width, _deepstack(contract)
    ids = TensorSpec("input_ids", "int64", ("B", "S"))
    embeds = TensorSpec("inputs_embeds", contract.dtype, ("B", "S", hidden))
    merged = (
        TensorSpec("image_features", contract.dtype, ("B", "N", width)),
        TensorSpec("visual_positions", "int64", ("B", "N")),
    )
    spec = contract.graphs["embed"]
    wanted = (ids,) if contract.crosses else (ids, *merged)
    if sorted(spec.inputs, key=_name) != sorted(wanted, key=_name) or spec.outputs != (embeds, *added):
        returned = ", ".join(map(_said, (embeds, *added)))
        yield f"the embedding does not turn {', '.join(map(_said, wanted))} into {returned}"


def _deepstack(contract: Contract) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in contract.graphs["decoder"].inputs if tensor.name == DEEPSTACK)


def _vision(contract: Contract) -> Iterator[str]:
    width = contract.feature_width
    outputs = contract.graphs["vision"].outputs
    seen = (
        (TensorSpec("visual_attention", "float32", ("I", contract.image_tokens)),) if contract.guide == VISION else ()
    )
    names = [tensor.name for tensor in outputs[:1]]
    if names != ["image_features"] or outputs[0].dtype != contract.dtype or outputs[1:] != seen:
        more = " and visual_attention [I, image_tokens]" if seen else ", and nothing else"
        yield f"the vision graph must return image_features of {contract.dtype}{more}"
        return
    shape = outputs[0].shape
    if _width(outputs[0]) != width or len(shape) not in (2, 3):
        yield f"the vision graph returns {_said(outputs[0])}, the decoder takes features of width {width}"
    elif len(shape) == 3 and shape[1] != contract.image_tokens:
        yield f"the vision graph returns {shape[1]} features a picture, image_tokens is {contract.image_tokens}"


def _dims(contract: Contract) -> Iterator[str]:
    for name, (low, high) in contract.dims.items():
        if low > high:
            yield f"dims.{shown(name)} is {low} to {high}"
    for spec in contract.graphs.values():
        for tensor in spec.inputs:
            for dim in tensor.shape:
                if isinstance(dim, str) and dim not in contract.dims:
                    yield f"dims has no {shown(dim)}, a size of {shown(tensor.name)} in {spec.file}"
    for index, group in enumerate(contract.groups):
        if contract.dims[f"W{index}"] != (1, group.capacity):
            yield f"dims.W{index} is not 1 to the capacity of its group, {group.capacity}"
    if contract.dims["B"][0] < 1 or contract.dims["S"][0] != 1 or contract.dims["S"][1] > contract.max_seq_len:
        yield "dims.B and dims.S must begin at 1, and dims.S end at max_seq_len or before"
    for index, group in enumerate(contract.groups):
        if group.window and group.window + contract.dims["S"][1] > group.capacity:
            yield f"groups[{index}].capacity is {group.capacity}; its window and the longest step take more"
    if contract.dims.get("R", (0, 0))[0] != 0:
        yield "dims.R must begin at 0"
    if "N" not in contract.dims or contract.dims["N"][0] != 0:
        yield "dims.N must begin at 0"
    elif not contract.crosses and contract.dims["N"][1] > contract.dims["S"][1]:
        yield f"dims.N reaches {contract.dims['N'][1]}, a step has at most {contract.dims['S'][1]} tokens"


def _pictures(contract: Contract) -> Iterator[str]:
    if contract.image_tokens > contract.dims["N"][1]:
        yield f"image_tokens is {contract.image_tokens}, a step takes {contract.dims['N'][1]} visual tokens"
    if contract.image_grid is not None and contract.image_grid[0] * contract.image_grid[1] > contract.image_tokens:
        yield f"image_grid is {list(contract.image_grid)}, a picture has {contract.image_tokens} tokens"


def _width(tensor: TensorSpec | None) -> int | None:
    last = tensor.shape[-1] if tensor is not None and tensor.shape else None
    return last if isinstance(last, int) and last > 0 else None


def _name(tensor: TensorSpec) -> str:
    return tensor.name


def _said(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
