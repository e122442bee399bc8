"""The decoder boundary that exporters share, recognised by names and shapes.

    =============================  ==============  =============================================================
    inputs_embeds, or input_ids    [B, S, D]       or [B, S]
    attention_mask                 [B, P + S]      1 for real tokens, those of earlier steps first; may be missing
    position_ids                   [B, S]          or [3, B, S] (M-RoPE); may be missing
    past_key_values.L.key/.value   [B, KV, P, Dh]  what earlier steps returned as present.L.key/.value
    logits                         [B, S, V]       or [B, 1, V] of the last token
    present.L.key/.value           [B, KV, P + S, Dh]
    =============================  ==============  =============================================================

Inputs besides these are kept as they are; where later layers need one that has a size of its own, the pass refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from vlmtrim.graphs.errors import GraphError

_PAST = re.compile(r"past_key_values\.(\d{1,4})\.(key|value)")
_PRESENT = re.compile(r"present(?:_key_values)?\.(\d{1,4})\.(key|value)")
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_MASKS = (*_INTEGERS, ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.FLOAT16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# A decoder in which a switch says whether there is a past: two graphs in one, behind an If.
_MERGED = "use_cache_branch"


@dataclass(frozen=True)
class Cache:
    """Caches of a layer, as they come and as they are returned."""

    key: ir.Value
    value: ir.Value
    new_key: ir.Value
    new_value: ir.Value


@dataclass(frozen=True)
class Boundary:
    """Inputs and outputs by meaning; ``tokens`` is inputs_embeds [B, S, D] or input_ids [B, S]."""

    tokens: ir.Value
    mask: ir.Value | None
    positions: ir.Value | None
    logits: ir.Value
    caches: tuple[Cache, ...]

    @property
    def embedded(self) -> bool:
        """Whether tokens come as embeddings."""
        return rank(self.tokens) == 3


def is_foreign(model: ir.Model) -> bool:
    """Whether a graph has caches and none of the inputs that our contract adds to them."""
    names = {value.name or "" for value in model.graph.inputs}
    own = any(name.startswith(("write_indices", "key_positions")) for name in names)
    return not own and any(_PAST.fullmatch(name) for name in names)


def recognise(model: ir.Model) -> Boundary:
    """The boundary of a decoder. Raises GraphError naming what differs from the table above."""
    inputs = {v.name: v for v in model.graph.inputs if v.name not in model.graph.initializers}
    outputs = {v.name: v for v in model.graph.outputs}
    if _MERGED in inputs:
        raise GraphError(
            f"the decoder has the input {_MERGED}: it is two decoders in one If; give the one with a past "
            "(decoder_with_past_model.onnx), or export without merging"
        )
    if "visual_positions" in inputs:
        raise GraphError("the decoder already selects visual tokens; start from the graph without selection")
    if ("inputs_embeds" in inputs) == ("input_ids" in inputs):
        found = "both" if "inputs_embeds" in inputs else f"neither, but {_listed(inputs)}"
        raise GraphError(f"expected the input inputs_embeds or input_ids; found {found}")
    if "inputs_embeds" in inputs:
        tokens = _checked(inputs["inputs_embeds"], _FLOATS, (3,))
    else:
        tokens = _checked(inputs["input_ids"], _INTEGERS, (2,))
    mask = inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    if "logits" not in outputs:
        raise GraphError(f"expected the output logits; found {_listed(outputs)}")
    return Boundary(
        tokens,
        None if mask is None else _checked(mask, _MASKS, (2,)),
        None if positions is None else _checked(positions, _INTEGERS, (2, 3)),
        outputs["logits"],
        tuple(_caches(inputs, outputs)),
    )


def _caches(inputs: dict[str | None, ir.Value], outputs: dict[str | None, ir.Value]) -> Iterable[Cache]:
    past = {match.groups(): inputs[name] for name in inputs if (match := _PAST.fullmatch(name or ""))}
    present = {match.groups(): outputs[name] for name in outputs if (match := _PRESENT.fullmatch(name or ""))}
    layers = 1 + max((int(layer) for layer, _ in past), default=-1)
    for layer in range(layers):
        found = []
        for kind in ("key", "value"):
            at = str(layer), kind
            if at not in past:
                raise GraphError(
                    f"layer {layer}: expected the input past_key_values.{layer}.{kind}, as layer {layers - 1} has; "
                    "found none (layers without such a cache, e.g. recurrent ones, are not supported)"
                )
            if at not in present:
                raise GraphError(f"layer {layer}: expected the output present.{layer}.{kind}; found none")
            cache = _checked(past[at], None, (4,))
            assert cache.shape is not None
            if isinstance(cache.shape[2], int):
                raise GraphError(
                    f"layer {layer}: expected {cache.name} [B, KV, P, Dh] to grow with the tokens; found "
                    f"{cache.shape}, of a fixed length: export with dynamic caches"
                )
            found.append((cache, present[at]))
        (key, new_key), (value, new_value) = found
        yield Cache(key, value, new_key, new_value)


def _checked(value: ir.Value, dtypes: tuple[ir.DataType, ...] | None, ranks: tuple[int, ...]) -> ir.Value:
    if rank(value) not in ranks:
        wanted = " or ".join(map(str, ranks))
        raise GraphError(f"expected {value.name} of {wanted} dimensions; found {value.shape}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(dtype.name for dtype in dtypes)
        raise GraphError(f"expected {value.name} of one of the types {wanted}; found {value.dtype}")
    return value


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions; None where not known."""
    return None if value is None or value.shape is None else len(value.shape)


def _listed(values: Iterable[str | None]) -> str:
    """Names for a message, without those of caches."""
    caches = (_PAST, _PRESENT)
    names = [name or "(no name)" for name in values if not any(form.fullmatch(name or "") for form in caches)]
    return ", ".join(names[:8]) + (" and more" if len(names) > 8 else "") or "none"
