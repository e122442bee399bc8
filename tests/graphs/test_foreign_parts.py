"""Vision and embedding graphs of others in the contract's form: run against numpy, refused by name."""

import foreign_parts as parts
import numpy as np
import onnx_ir as ir
import pytest
from plain_loop import session

from vlmtrim.graphs import GraphError
from vlmtrim.graphs.contract import GraphSpec, TensorSpec
from vlmtrim.graphs.foreign.embedding import own_embedding
from vlmtrim.graphs.foreign.vision import own_vision
from vlmtrim.graphs.lint import lint

W = parts.weights()


def own(model, vocabulary=parts.VOCABULARY, image=parts.IMAGE, spec=parts.EMBED_SPEC):
    return own_embedding(model, spec, vocabulary, image)


@pytest.mark.parametrize("flat", [False, True])
def test_pictures_become_what_numpy_says(flat):
    model = own_vision(parts.vision(W, flat), parts.VISION_SPEC)
    lint(model, parts.VISION_SPEC)
    pixels = np.random.default_rng(1).normal(size=(3, 3, parts.SIZE, parts.SIZE)).astype(np.float32)
    (found,) = session(model).run(None, {"pixel_values": pixels})
    cut = pixels.reshape(3, 3, 2, parts.PATCH, 2, parts.PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(3, 4, -1)
    states = cut @ W["patches"].reshape(parts.CHANNELS, -1).T + W["places"]
    centred = states - states.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * W["gamma"] + W["beta"]
    np.testing.assert_allclose(found, normed @ W["out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", parts.EMBEDDINGS)
def test_rows_of_a_batch_get_their_own_features(form):
    """Which counting along each row from the first feature on does not do."""
    model = own(parts.embedding(W, form))
    lint(model, parts.EMBED_SPEC)
    ids = np.array([[1, 5, 5, 2, 5, 3], [5, 4, 6, 7, 5, 5]])
    places = np.array([[1, 2, 4], [0, 4, 5]])
    features = np.random.default_rng(2).normal(size=(2, 3, parts.WIDTH)).astype(np.float32)
    run = session(model)
    given = {"input_ids": ids, "image_features": features, "visual_positions": places}
    (found,) = run.run(None, given)
    want = 3 * W["table"][ids]
    for row in range(2):
        want[row, places[row]] = features[row]
    np.testing.assert_array_equal(found, want)
    none = {"image_features": features[:, :0], "visual_positions": places[:, :0]}
    np.testing.assert_array_equal(run.run(None, {"input_ids": ids, **none})[0], 3 * W["table"][ids])


def with_input(model, name):
    model.graph.inputs.append(ir.val(name, dtype=ir.DataType.INT64, shape=("n",)))
    return model


def with_dims(model, *dims):
    model.graph.inputs[0].shape = ir.Shape(dims)
    return model


def without_scale_behind(form):
    """Embeddings that are scaled once features are in."""
    model = parts.embedding(W, form)
    last, node = model.graph.outputs[0], ir.node("Mul", [model.graph.outputs[0]] * 2, name="late")
    last.name, node.outputs[0].name = "before", "inputs_embeds"
    node.outputs[0].type, node.outputs[0].shape = last.type, last.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    return model


def renamed(model, operator, other, domain=""):
    node = next(node for node in model.graph if node.op_type == operator)
    node.op_type, node.domain = other, domain
    return model


def spec_of(width=parts.WIDTH, dtype="float32", tokens=parts.PATCHES):
    pixels = TensorSpec("pixel_values", dtype, ("I", 3, parts.SIZE, parts.SIZE))
    return GraphSpec("vision.onnx", (pixels,), (TensorSpec("image_features", dtype, ("I", tokens, width)),))


TILED = GraphSpec("vision.onnx", (*spec_of().inputs, TensorSpec("feature_index", "int64", ("M",))), spec_of().outputs)


@pytest.mark.parametrize(
    ("make", "spec", "expected"),
    [
        (lambda: parts.vision(W), TILED, "takes pixel_values, feature_index.*leave --vision out"),
        (lambda: with_input(parts.vision(W), "sizes"), spec_of(), "pixel_values alone; found pixel_values, sizes"),
        (lambda: parts.vision(W), spec_of(width=16), "4 features of width 16.*found"),
        (lambda: parts.vision(W), spec_of(tokens=5), "5 features of width 12.*found"),
        (lambda: parts.vision(W), spec_of(dtype="float16"), "pixel_values in float16.*found float32"),
        (lambda: with_dims(parts.vision(W), "n", 3, 9, 9), spec_of(), "pictures .*8, 8.*found .*9,9"),
        (lambda: with_dims(parts.vision(W), 1, 3, 8, 8), spec_of(), "any number of pictures.*found .1,3,8,8"),
        (lambda: with_dims(parts.vision(W), "n", 192), spec_of(), "pixel_values .I, 3, H, W.; found pixel_values"),
        (lambda: renamed(parts.vision(W), "MatMul", "MatMulNBits", "com.microsoft"), spec_of(), "MatMulNBits"),
        (lambda: renamed(parts.vision(W), "MatMul", "If"), spec_of(), None),
    ],
)
def test_vision_of_another_form_is_refused(make, spec, expected):
    model = make()
    if expected is None:  # a branch
        inner = ir.Graph([], [], nodes=[], name="then")
        node = next(node for node in model.graph if node.op_type == "If")
        node.attributes["then_branch"] = ir.AttrGraph("then_branch", inner)
        expected = "no graph inside a node"
    with pytest.raises(GraphError, match=expected):
        own_vision(model, spec)


@pytest.mark.parametrize(
    ("make", "more", "expected"),
    [
        (lambda: parts.embedding(W, "counted"), {"vocabulary": 18}, "table of 18 tokens of width 12.*found .17,12"),
        (lambda: parts.embedding(W, "counted"), {"image": 6}, "features at the tokens 6 .*token 1 of a made-up row"),
        (lambda: with_input(parts.embedding(W, "counted"), "attention_mask"), {}, "found input_ids, image_features, a"),
        (lambda: without_scale_behind("scattered"), {}, "other numbers at token 0.*by Mul .late"),
        (lambda: with_dims(parts.embedding(W, "looked-up"), 1, "n"), {}, "input_ids .B, S. of any size; found .1,n"),
        (
            lambda: renamed(parts.embedding(W, "looked-up"), "Gather", "Compress"),
            {},
            "looked up by one Gather; found n",
        ),
        (lambda: renamed(parts.embedding(W, "counted"), "Where", "Odd", "x"), {}, "standard domain.*x.Odd"),
        (lambda: parts.embedding(W, "counted"), {"spec": parts.VISION_SPEC}, "leave --embedding out"),
    ],
)
def test_an_embedding_of_another_model_or_form_is_refused(make, more, expected):
    with pytest.raises(GraphError, match=expected):
        own(make(), **more)
