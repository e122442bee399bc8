"""Graphs that other exporters wrote, in place of traced ones, in the contract's form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from vlmtrim.export.given_weights import DTYPES, inline_small
from vlmtrim.export.job import Job, Refusal
from vlmtrim.export.tracing.text_decoder import Shape
from vlmtrim.graphs.contract import Contract, GraphSpec
from vlmtrim.graphs.errors import GraphError
from vlmtrim.graphs.files import load
from vlmtrim.graphs.foreign.boundary import is_foreign, recognise
from vlmtrim.graphs.foreign.embedding import own_embedding
from vlmtrim.graphs.foreign.own_form import own_form
from vlmtrim.graphs.foreign.vision import own_vision


def read(job: Job, plain: GraphSpec, contract: Contract, shape: Shape) -> Iterator[tuple[str, ir.Model]]:
    """Those graphs of the bundle that the job names files of, by their names in the contract.

    Args:
        plain: boundary of the decoder before any selection.
        shape: of the checkpoint.

    Raises:
        Refusal: a file is no such graph, or of another model or dtype. GraphError: it has no such form.
    """
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # it says more than one sentence of a broken graph
    if job.vision is not None:
        yield "vision", _named("--vision", job.vision, lambda m: own_vision(m, contract.graphs["vision"]))
    if job.embedding is not None:
        vocabulary, token = plain.outputs[0].shape[-1], contract.image_token_id
        assert isinstance(vocabulary, int)
        spec = contract.graphs["embed"]
        yield "embed", _named("--embedding", job.embedding, lambda m: own_embedding(m, spec, vocabulary, token))
    if job.decoder is not None:
        windows = [shape.window * (layer in shape.near_layers) for layer in range(shape.layers)]
        yield "decoder", read_decoder(job.decoder, plain, windows, shape.sees_ahead)


def _named(option: str, path: str, rewrite: Callable[[ir.Model], ir.Model]) -> ir.Model:
    """A graph of a file, rewritten; errors begin with both."""
    model = _loaded(option, path)
    try:
        return rewrite(model)
    except GraphError as error:
        raise GraphError(f"{option} {path}: {error}") from error


def _loaded(option: str, path: str) -> ir.Model:
    try:
        model = load(path)
    except ValueError as error:
        raise Refusal(f"{option} {path} is not a readable ONNX file") from error
    inline_small(model)
    return model


def read_decoder(path: str, spec: GraphSpec, windows: Sequence[int] = (), sees_ahead: bool = False) -> ir.Model:
    """The decoder of a file with the boundary ``spec``; see :func:`own_form`. Raises as :func:`read` does."""
    model = _loaded("--decoder", path)
    if not is_foreign(model):
        raise Refusal(f"--decoder {path} is no decoder with caches that grow, past_key_values.L.key/value")
    boundary, wanted = recognise(model), spec.inputs[0].dtype
    caches = [tensor for tensor in spec.inputs if tensor.name.startswith("past_")]
    dtype = DTYPES.get(boundary.tokens.dtype or ir.DataType.UNDEFINED, (None, str(boundary.tokens.dtype)))[1]
    if dtype != wanted:
        raise Refusal(f"--decoder {path} computes in {dtype}, the bundle in {wanted}; give --dtype {dtype}")
    if 2 * len(boundary.caches) != len(caches):
        raise Refusal(f"--decoder {path} has {len(boundary.caches)} layers, the checkpoint {len(caches) // 2}")
    capacity = caches[0].shape[2]
    assert isinstance(capacity, int)
    return own_form(model, capacity, windows, sees_ahead)
