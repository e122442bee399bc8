"""A decoder graph made by hand (no torch) with the boundary of the contract, small enough for property tests."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.contract import CacheGroup
from vlmtrim.graphs.ops import Ops

IR_DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}


def weights(seed: int, layers: int, heads: int, kv: int, dh: int = 8, vocabulary: int = 13) -> dict:
    """Random weights of unit gain."""
    random, hidden = np.random.default_rng(seed), heads * dh

    def matrix(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)

    names = {"q": heads * dh, "k": kv * dh, "v": kv * dh, "o": hidden, "m": hidden}
    return {
        "sizes": (heads, kv, dh),
        "freq": (0.3 ** np.arange(dh // 2)).astype(np.float32),
        "layers": [{name: matrix(hidden, width) for name, width in names.items()} for _ in range(layers)],
        "head": matrix(hidden, vocabulary),
    }


def build(w: dict, capacity: int) -> ir.Model:
    """The weights as an ONNX decoder without selection."""
    heads, kv, dh = w["sizes"]
    group = CacheGroup(tuple(range(len(w["layers"]))), capacity, kv, dh)
    spec = decoder_spec(
        dtype="float32", hidden=heads * dh, vocabulary=w["head"].shape[1], groups=(group,), selects=False
    )
    inputs = {t.name: ir.val(t.name, dtype=IR_DTYPES[t.dtype], shape=t.shape) for t in spec.inputs}
    ops = Ops("toy")

    def split_heads(x: ir.Value, count: int) -> ir.Value:
        return ops("Transpose", ops("Reshape", x, ops.const([0, -1, count, dh])), perm=[0, 2, 1, 3])

    x, write, window = inputs["inputs_embeds"], inputs["write_indices.0"], inputs["key_positions.0"]
    angle = ops("Mul", ops("Unsqueeze", ops("Cast", inputs["position_ids"], to=1), ops.const([2])), _f(ops, w["freq"]))
    cos, sin = ops("Cos", angle), ops("Sin", angle)
    step = ops("Range", ops.const(0), ops("Squeeze", ops.dim(x, 1), ops.const([0])), ops.const(1))
    query_at = ops("Add", ops("Unsqueeze", write, ops.const([1])), step)
    seen = ops("LessOrEqual", window, ops("Unsqueeze", query_at, ops.const([1, 3])))
    mask = ops("Where", seen, _f(ops, 0.0), _f(ops, -3e38))

    def rotate(y: ir.Value) -> ir.Value:
        return ops("RotaryEmbedding", y, cos, sin)

    presents = []
    for index, layer in enumerate(w["layers"]):
        q = split_heads(ops("MatMul", x, _f(ops, layer["q"])), heads)
        q = rotate(q)
        q.dtype, q.shape = ir.DataType.FLOAT, ir.Shape(("B", heads, "S", dh))
        k, v = (split_heads(ops("MatMul", x, _f(ops, layer[n])), kv) for n in "kv")
        live = []
        for kind, new in (("key", rotate(k)), ("value", v)):
            present = ops("TensorScatter", inputs[f"past_key_values.{index}.{kind}"], new, write, axis=2)
            present.name = f"present.{index}.{kind}"
            present.dtype, present.shape = ir.DataType.FLOAT, ir.Shape(("B", kv, capacity, dh))
            presents.append(present)
            live.append(ops.slice(present, ops.const([0]), ops("Shape", window), axis=2))
        y = ops("Attention", q, *live, mask)
        y = ops("Reshape", ops("Transpose", y, perm=[0, 2, 1, 3]), ops.const([0, -1, heads * dh]))
        x = ops("Add", x, ops("MatMul", y, _f(ops, layer["o"])))
        x = ops("Add", x, ops("Tanh", ops("MatMul", x, _f(ops, layer["m"]))))
        x.dtype, x.shape = ir.DataType.FLOAT, ir.Shape(("B", "S", heads * dh))
    last = ops("GatherND", x, ops("Unsqueeze", inputs["last_index"], ops.const([1])), batch_dims=1)
    logits = ops("MatMul", last, _f(ops, w["head"]))
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(("B", w["head"].shape[1]))
    graph = ir.Graph(
        list(inputs.values()), [logits, *presents], nodes=ops.nodes, opset_imports={"": 24}, name="toy_decoder"
    )
    return ir.Model(graph, ir_version=10)


def _f(ops: Ops, value: np.ndarray | float) -> ir.Value:
    return ops.const(value, np.float32)
