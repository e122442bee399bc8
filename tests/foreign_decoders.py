"""Small decoders with the boundary that exporters share, made by hand in the forms of attention that they write."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.ops import Ops

FORMS = ("attention", "joined", "written-out", "group-query", "group-query-packed", "group-query-outside")
HEADS, KV, DH, LAYERS, HIDDEN, VOCABULARY, MOST = 4, 2, 16, 4, 32, 17, 64
EPSILON = 1e-5


def weights(seed: int = 0, dtype=np.float32) -> dict:
    """Random weights of unit gain, and tables of cosines and sines by position."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.normal(size=(rows, columns)) / rows**0.5).astype(dtype)

    shapes = {"q": (HIDDEN, HEADS * DH), "k": (HIDDEN, KV * DH), "v": (HIDDEN, KV * DH), "o": (HEADS * DH, HIDDEN)}
    shapes |= {"up": (HIDDEN, 48), "down": (48, HIDDEN)}
    layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
    for layer in layers:
        layer |= {name: (1 + 0.2 * random.normal(size=HIDDEN)).astype(dtype) for name in ("norm1", "norm2")}
    angle = np.arange(MOST)[:, None] * 0.4 ** np.arange(DH // 2)
    tables = {"cos": np.cos(angle).astype(dtype), "sin": np.sin(angle).astype(dtype)}
    return {
        "layers": layers,
        "norm": (1 + 0.2 * random.normal(size=HIDDEN)).astype(dtype),
        "head": matrix(HIDDEN, VOCABULARY),
        "embeddings": random.normal(size=(VOCABULARY, HIDDEN)).astype(dtype),
        **tables,
    }


class Builder(Ops):
    """Nodes of both domains, weights as initializers."""

    def __init__(self, w: dict, form: str, names: dict[str, str], ids: bool, constants: bool):
        super().__init__("d")
        self.w, self.form, self.ids, self.constants, self.initializers = w, form, ids, constants, []
        self.kind = ir.DataType.from_numpy(w["head"].dtype)
        b, s, p, t = (names.get(name, name) for name in ("B", "S", "P", "T"))
        self.tokens = (
            ir.val("input_ids", dtype=ir.DataType.INT64, shape=(b, s))
            if ids
            else ir.val("inputs_embeds", dtype=self.kind, shape=(b, s, HIDDEN))
        )
        self.mask = ir.val("attention_mask", dtype=ir.DataType.INT64, shape=(b, t))
        self.positions = ir.val("position_ids", dtype=ir.DataType.INT64, shape=(b, s))
        self.past = [
            [ir.val(f"past_key_values.{i}.{k}", dtype=self.kind, shape=(b, KV, p, DH)) for k in ("key", "value")]
            for i in range(LAYERS)
        ]
        self.present: list[list[ir.Value]] = []
        self.inner = "inside" if form in ("group-query", "group-query-packed") else form

    def weight(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer, or a Constant node."""
        if self.constants:
            return self("Constant", value=ir.tensor(array, name=name))
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(self.kind))
        value.shape = ir.Shape(array.shape)
        self.initializers.append(value)
        return value

    def microsoft(self, operator: str, *inputs: ir.Value | None, outputs: int = 1, **attributes) -> list[ir.Value]:
        """A node of com.microsoft."""
        node = ir.node(operator, inputs, attributes=attributes, num_outputs=outputs, domain="com.microsoft")
        node.name = f"d/{operator}_{len(self.nodes)}"
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def split_heads(self, x: ir.Value, count: int) -> ir.Value:
        """[B, S, H * Dh] -> [B, H, S, Dh]."""
        x = self("Transpose", self("Reshape", x, self.const([0, 0, count, DH])), perm=[0, 2, 1, 3])
        x.type, x.shape = ir.TensorType(self.kind), ir.Shape((self.tokens.shape[0], count, self.tokens.shape[1], DH))
        return x

    def typed(self, x: ir.Value, width: int = HIDDEN) -> ir.Value:
        """With the shape [B, S, width]."""
        x.type, x.shape = ir.TensorType(self.kind), ir.Shape((*self.tokens.shape[:2], width))
        return x


def build(
    form: str,
    w: dict,
    names: dict[str, str] | None = None,
    ids: bool = False,
    last: bool = False,
    constants: bool = False,
    opset: int = 23,
) -> ir.Model:
    """A decoder. ``names`` of dimensions, ``ids`` instead of embeddings, logits of the ``last`` token alone."""
    b = Builder(w, form, names or {}, ids, constants)
    tables = [b.weight(w[name], name) for name in ("cos", "sin")]
    x = b("Gather", b.weight(w["embeddings"], "embeddings"), b.tokens) if ids else b.tokens
    x = b.typed(x) if ids else x
    shared = _shared(b, tables)
    residual, added = x, None
    for index, layer in enumerate(w["layers"]):
        normed, residual = _norm(b, residual, added, b.weight(layer["norm1"], f"{index}.norm1"))
        q, k, v = (b.typed(b("MatMul", normed, b.weight(layer[n], f"{index}.{n}")), layer[n].shape[1]) for n in "qkv")
        y = _attention(b, index, q, k, v, shared, tables)
        added = b.typed(b("MatMul", y, b.weight(layer["o"], f"{index}.o")))
        normed, residual = _norm(b, residual, added, b.weight(layer["norm2"], f"{index}.norm2"))
        up = b("Tanh", b("MatMul", normed, b.weight(layer["up"], f"{index}.up")))
        added = b.typed(b("MatMul", up, b.weight(layer["down"], f"{index}.down")))
    normed, _ = _norm(b, residual, added, b.weight(w["norm"], "norm"))
    if last:
        normed = b("Slice", normed, b.const([-1]), b.const([2**31 - 1]), b.const([1]))
    logits = b("MatMul", normed, b.weight(w["head"], "head"))
    logits.name, logits.type = "logits", ir.TensorType(b.kind)
    logits.shape = ir.Shape((b.tokens.shape[0], 1 if last else b.tokens.shape[1], VOCABULARY))
    presents = []
    for index, pair in enumerate(b.present):
        for kind, value in zip(("key", "value"), pair, strict=True):
            value.name, value.type = f"present.{index}.{kind}", ir.TensorType(b.kind)
            value.shape = ir.Shape((b.tokens.shape[0], KV, b.mask.shape[1], DH))
            presents.append(value)
    inputs = [
        b.tokens,
        b.mask,
        *([] if b.inner == "inside" else [b.positions]),
        *(cache for pair in b.past for cache in pair),
    ]
    imports = {"": opset, "com.microsoft": 1}
    graph = ir.Graph(
        inputs, [logits, *presents], nodes=b.nodes, initializers=b.initializers, opset_imports=imports, name="decoder"
    )
    return ir.Model(graph, ir_version=10)


def _shared(b: Builder, tables: list[ir.Value]) -> tuple[ir.Value, ...]:
    """What all layers read besides the tokens: mask and tables, or the lengths that a grouped query attention takes."""
    if b.form.startswith("group-query"):
        real = b("Sub", b("ReduceSum", b.mask, b.const([1]), keepdims=0), b.const([1]))
        total = b("Gather", b("Shape", b.mask), b.const(1))
        return b("Cast", real, to=ir.DataType.INT32), b("Cast", total, to=ir.DataType.INT32)
    rotary = tuple(b("Gather", table, b.positions) for table in tables)
    real = b("Unsqueeze", b("Cast", b.mask, to=ir.DataType.BOOL), b.const([1, 2]))
    if b.form == "attention":
        shape = b.concat(b.dim(b.tokens, 0), b.const([1]), b.dim(b.tokens, 1), b.dim(b.mask, 1))
        mask = b("Expand", real, shape)
        mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(("B", 1, "S", "T"))
        return (mask, *rotary)
    # As traced models have it: a range over the past of the first layer and the tokens.
    past, tokens = b.dim(b.past[0][0], 2), b.dim(b.tokens, 1)
    total = b("Squeeze", b("Add", past, tokens), b.const([0]))
    key = b("Range", b.const(0), total, b.const(1))
    query = b("Add", b("Range", b.const(0), b("Squeeze", tokens, b.const([0])), b.const(1)), past)
    seen = b("And", b("LessOrEqual", key, b("Unsqueeze", query, b.const([1]))), real)
    low = b.const(np.finfo(b.w["head"].dtype).min, b.w["head"].dtype)
    return (b("Where", seen, b.const(0, b.w["head"].dtype), low), *rotary)


def _norm(b: Builder, residual: ir.Value, added: ir.Value | None, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(norm of the sum, the sum); in one node where exporters for ONNX Runtime write one."""
    if b.form == "written-out":
        total = residual if added is None else b.typed(b("Add", residual, added))
        squares = b("ReduceSum", b("Mul", total, total), b.const([-1]), keepdims=1)
        mean = b("Div", squares, b.const(HIDDEN, b.w["head"].dtype))
        scale = b("Reciprocal", b("Sqrt", b("Add", mean, b.const(EPSILON, b.w["head"].dtype))))
        return b.typed(b("Mul", b("Mul", total, scale), weight)), total
    if added is None:
        return b.typed(b("SimplifiedLayerNormalization", residual, weight, axis=-1, epsilon=EPSILON)), residual
    outputs = b.microsoft("SkipSimplifiedLayerNormalization", residual, added, weight, outputs=4, epsilon=EPSILON)
    return outputs[0], outputs[3]  # no shapes: onnx infers none of this operator


def _attention(
    b: Builder, index: int, q: ir.Value, k: ir.Value, v: ir.Value, shared: tuple[ir.Value, ...], tables: list[ir.Value]
) -> ir.Value:
    past = b.past[index]
    if b.form == "attention":
        mask, cos, sin = shared
        q = b.typed(b("RotaryEmbedding", q, cos, sin, num_heads=HEADS), HEADS * DH)
        k = b.typed(b("RotaryEmbedding", k, cos, sin, num_heads=KV), KV * DH)
        heads = {"q_num_heads": HEADS, "kv_num_heads": KV, "is_causal": 1, "scale": DH**-0.5}
        y, *present = b("Attention", q, k, v, mask, *past, outputs=3, **heads)
        b.present.append(present)
        return y
    if b.form.startswith("group-query"):
        heads = {"num_heads": HEADS, "kv_num_heads": KV, "scale": DH**-0.5}
        inside = b.inner == "inside"
        if not inside:
            q, k = (b.microsoft("RotaryEmbedding", part, b.positions, *tables)[0] for part in (q, k))
        if b.form == "group-query-packed":
            q, k, v = b.typed(b("Concat", q, k, v, axis=2), (HEADS + 2 * KV) * DH), None, None
        inputs = [q, k, v, *past, *shared, *(tables if inside else [])]
        y, *present = b.microsoft("GroupQueryAttention", *inputs, outputs=3, do_rotary=int(inside), **heads)
        b.present.append(present)
        return y
    mask, cos, sin = shared
    cos, sin = (b("Unsqueeze", b("Concat", table, table, axis=-1), b.const([1])) for table in (cos, sin))

    def turned(x: ir.Value) -> ir.Value:
        low, high = (b("Slice", x, b.const([a]), b.const([z]), b.const([3])) for a, z in ((0, DH // 2), (DH // 2, DH)))
        return b("Add", b("Mul", x, cos), b("Mul", b("Concat", b("Neg", high), low, axis=-1), sin))

    keys = b("Concat", past[0], turned(b.split_heads(k, KV)), axis=2)
    values = b("Concat", past[1], b.split_heads(v, KV), axis=-2)
    b.present.append([keys, values])
    if b.form == "joined":  # as torch.onnx.export has it from opset 23 on
        y = b("Attention", turned(b.split_heads(q, HEADS)), keys, values, mask, scale=DH**-0.5)
        y.type, y.shape = ir.TensorType(b.kind), ir.Shape(("B", HEADS, "S", DH))
        return b("Reshape", b("Transpose", y, perm=[0, 2, 1, 3]), b.const([0, 0, HEADS * DH]))
    repeated = []
    for x in (keys, values):  # a head's keys for each of its queries
        shape = b.concat(b.dim(x, 0), b.const([KV]), b.const([HEADS // KV]), b.dim(x, 2), b.const([DH]))
        x = b("Expand", b("Unsqueeze", x, b.const([2])), shape)
        repeated.append(b("Reshape", x, b.concat(b.dim(x, 0), b.const([HEADS]), b.dim(x, 3), b.const([DH]))))
    logits = b("MatMul", turned(b.split_heads(q, HEADS)), b("Transpose", repeated[0], perm=[0, 1, 3, 2]))
    logits = b("Add", b("Mul", logits, b.const(DH**-0.5, b.w["head"].dtype)), mask)
    logits.type, logits.shape = ir.TensorType(b.kind), ir.Shape(("B", HEADS, "S", "T"))
    y = b("MatMul", b("Softmax", logits, axis=-1), repeated[1])
    return b("Reshape", b("Transpose", y, perm=[0, 2, 1, 3]), b.const([0, 0, HEADS * DH]))
