"""Small vision and embedding graphs of the forms that exporters write, made by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlmtrim.graphs.contract import GraphSpec, TensorSpec
from vlmtrim.graphs.ops import Ops

SIZE, PATCH, CHANNELS, WIDTH, VOCABULARY, IMAGE = 8, 4, 6, 12, 17, 5
PATCHES = (SIZE // PATCH) ** 2
EMBEDDINGS = ("looked-up", "counted", "scattered")
VISION_SPEC = GraphSpec(
    "vision.onnx",
    (TensorSpec("pixel_values", "float32", ("I", 3, SIZE, SIZE)),),
    (TensorSpec("image_features", "float32", ("I", PATCHES, WIDTH)),),
)
EMBED_SPEC = GraphSpec(
    "embed.onnx",
    (
        TensorSpec("input_ids", "int64", ("B", "S")),
        TensorSpec("image_features", "float32", ("B", "N", WIDTH)),
        TensorSpec("visual_positions", "int64", ("B", "N")),
    ),
    (TensorSpec("inputs_embeds", "float32", ("B", "S", WIDTH)),),
)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of unit gain."""
    random = np.random.default_rng(seed)
    shapes = {
        "patches": (CHANNELS, 3, PATCH, PATCH),
        "places": (PATCHES, CHANNELS),
        "gamma": (CHANNELS,),
        "beta": (CHANNELS,),
        "out": (CHANNELS, WIDTH),
        "table": (VOCABULARY, WIDTH),
    }
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def vision(w: dict[str, np.ndarray], flat: bool = False) -> ir.Model:
    """Patches, places, a fused norm and a projector; ``flat``: features of all pictures in one row."""
    ops, values = Ops("v"), _initializers(w, "patches", "places", "gamma", "beta", "out")
    pixels = ir.val("pixel_values", dtype=ir.DataType.FLOAT, shape=("n", 3, "height", "width"))
    x = ops("Conv", pixels, values["patches"], strides=[PATCH, PATCH], kernel_shape=[PATCH, PATCH])
    x = ops("Transpose", ops("Reshape", x, ops.const([0, CHANNELS, -1])), perm=[0, 2, 1])
    norm = ir.node("SkipLayerNormalization", [x, *(values[name] for name in ("places", "gamma", "beta"))])
    norm.domain, norm.name, norm.outputs[0].name = "com.microsoft", "v/norm", "v/normed"
    ops.nodes.append(norm)
    x = ops("MatMul", norm.outputs[0], values["out"])
    if flat:
        x = ops("Reshape", x, ops.const([-1, WIDTH]))
    return _model(ops, [pixels], x, "features", ("m", WIDTH) if flat else ("n", PATCHES, WIDTH), values)


def embedding(w: dict[str, np.ndarray], form: str, scale: float = 3.0) -> ir.Model:
    """A scaled lookup, alone, or with features that are counted along a row or scattered to where tokens are theirs."""
    ops, values = Ops("e"), _initializers(w, "table")
    ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=("batch", "tokens"))
    features = ir.val("image_features", dtype=ir.DataType.FLOAT, shape=("f", WIDTH))
    x = ops("Mul", ops("Gather", values["table"], ids), ops.const(scale, np.float32))
    seen = ops("Equal", ids, ops.const(IMAGE))
    if form == "counted":
        number = ops("Sub", ops("CumSum", ops("Cast", seen, to=ir.DataType.INT64), ops.const(1)), ops.const(1))
        padded = ops("Concat", features, ops.const(np.zeros((1, WIDTH)), np.float32), axis=0)
        picked = ops("Gather", padded, ops("Clip", number, ops.const(0)))
        x = ops("Where", ops("Unsqueeze", seen, ops.const([-1])), picked, x)
    elif form == "scattered":
        x = ops("ScatterND", x, ops("Transpose", ops("NonZero", seen), perm=[1, 0]), features)
    taken = [ids] if form == "looked-up" else [ids, features]
    return _model(ops, taken, x, "inputs_embeds", ("batch", "tokens", WIDTH), values)


def _initializers(w: dict[str, np.ndarray], *names: str) -> dict[str, ir.Value]:
    values = {}
    for name in names:
        values[name] = ir.Value(name=name, const_value=ir.tensor(w[name], name=name))
        values[name].type, values[name].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(w[name].shape)
    return values


def _model(ops: Ops, inputs: list[ir.Value], output: ir.Value, name: str, shape: tuple, values: dict) -> ir.Model:
    output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    imports = {"": 17, "com.microsoft": 1}
    parts = {"nodes": ops.nodes, "initializers": values.values(), "opset_imports": imports, "name": "part"}
    return ir.Model(ir.Graph(inputs, [output], **parts), ir_version=10)
