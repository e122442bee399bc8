"""trim-onnx: arguments, files, and what it says of decoders that it cannot trim."""

import os
import subprocess
import sys

import foreign_decoders as decoders
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from plain_loop import Loop, session

from vlmtrim.graphs import FastV, GraphError
from vlmtrim.graphs.foreign.cli import main

W = decoders.weights()
VISUAL = [[1, 2, 3, 5]]


def prompt(dtype=np.float32):
    return [np.random.default_rng(0).normal(size=(9, decoders.HIDDEN)).astype(dtype)]


def write(folder, form="attention", data="", **fields):
    """A decoder file, its weights in ``data`` beside or below it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = decoders.build(form, W, **fields)
    (folder / data).parent.mkdir(exist_ok=True, parents=True)
    ir.save(model, folder / "model.onnx", **({"external_data": data, "size_threshold_bytes": 64} if data else {}))
    return folder / "model.onnx"


def said(capsys):
    message = capsys.readouterr().err.strip()
    assert message.startswith("trim-onnx: ") and "\n" not in message and "Traceback" not in message
    return message


def test_the_command_needs_neither_torch_nor_onnxruntime(tmp_path):
    """And writes, reads back and runs."""
    path = write(tmp_path)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnxruntime'], None))\n"
        "from vlmtrim.graphs.foreign.cli import main\n"
        f"sys.exit(main([{str(path)!r}, {str(tmp_path / 'out.onnx')!r}, '--k', '2', '--r', '0.5']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "layers 0 to 1 see all tokens, layers 2 to 3 the text and round(0.5 N) of N visual tokens" in done.stdout
    outputs = Loop(session(tmp_path / "out.onnx"), 1)(prompt(), VISUAL)
    assert outputs["kept_indices"].shape == (1, 7)


def test_help_and_list_take_no_onnx(capsys):
    for flag in ("--help", "--list"):
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "visual_positions" in shown and "last-row" in shown and "divprune" in shown


@pytest.mark.parametrize(
    ("data", "output"), [("w.bin", "out.onnx"), ("below/w.bin", "out.onnx"), ("w.bin", "../up.onnx")]
)
def test_weights_stay_where_they_are(tmp_path, data, output, capsys):
    path = write(tmp_path / "decoder", data=data)
    before = sorted(tmp_path.rglob("*"))
    target = path.parent / output
    assert main([str(path), str(target)]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, target.parent.resolve() / target.name])
    outputs = Loop(session(target), 1)(prompt(), VISUAL)
    want = Loop(session(FastV(k=2, r=0.5)(decoders.build("attention", W))), 1)(prompt(), VISUAL)
    for name, value in want.items():
        np.testing.assert_array_equal(outputs[name], value, err_msg=name)


def test_weights_above_the_file_are_referred_to_from_there(tmp_path, capsys):
    """A decoder in a folder below its weights: no loader takes it, the result lies where the weights are."""
    path = write(tmp_path, data="w.bin")
    model = ir.load(path)
    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "../w.bin",
                old.offset,
                old.length,
                old.dtype,
                shape=old.shape,
                name=old.name,
                base_dir=tmp_path / "below",
            )
    (tmp_path / "below").mkdir()
    ir.save(model, tmp_path / "below" / "model.onnx")
    assert main([str(tmp_path / "below" / "model.onnx"), str(tmp_path / "below" / "out.onnx")]) == 1
    assert f"write the decoder to that folder, e.g. {tmp_path / 'out.onnx'}" in said(capsys)
    assert main([str(tmp_path / "below" / "model.onnx"), str(tmp_path / "out.onnx")]) == 0
    assert Loop(session(tmp_path / "out.onnx"), 1)(prompt(), VISUAL)["kept_indices"].shape == (1, 7)


@pytest.mark.parametrize("damage", ["missing", "cut", "folder"])
def test_weights_that_are_not_all_there_are_refused(tmp_path, damage, capsys):
    path = write(tmp_path, data="w.bin")
    weights = tmp_path / "w.bin"
    if damage == "cut":
        os.truncate(weights, 100)
    else:
        weights.unlink()
        if damage == "folder":
            weights.mkdir()
    assert main([str(path), str(tmp_path / "out.onnx")]) == 1
    assert "w.bin" in said(capsys)
    assert not (tmp_path / "out.onnx").exists()


def test_arguments_that_cannot_be(tmp_path, capsys):
    path = write(tmp_path)
    out = str(tmp_path / "out.onnx")
    for arguments, status, expected in [
        ([str(path), str(path)], 2, "is the decoder itself"),
        ([str(path), str(tmp_path)], 2, "is a folder"),
        ([str(path), str(tmp_path / "none" / "out.onnx")], 2, "is no folder"),
        ([str(path), out, "--r", "1"], 2, "0 <= r < 1"),
        ([str(path), out, "--k", "-1"], 2, "k is -1"),
        ([str(path), out, "--k", "4"], 1, "the decoder has 4 layers: give 0 to 3"),
        ([str(path), out, "--score", "topv", "--grid", "2x2"], 1, "score topv reads norms"),
        ([str(path), out, "--score", "own-row"], 1, "score own-row reads norms"),
        ([str(path), out, "--score", "fastervlm"], 1, "score fastervlm comes from a vision graph"),
        ([str(path), out, "--score", "cells"], 1, "give grid=(rows, columns)"),
        ([str(tmp_path / "none.onnx"), out], 1, "no ONNX file"),
        ([str(tmp_path), out], 1, "no ONNX file"),
    ]:
        assert main(arguments) == status
        assert expected in said(capsys), arguments
    assert main([str(path), out, "--score", "cells", "--grid", "2x2"]) == 0
    capsys.readouterr()
    assert main([str(path), out]) == 2
    assert "--force" in said(capsys)
    assert main([str(path), out, "--force"]) == 0


def _node(model, operator, index=0):
    return [node for node in model.graph if node.op_type == operator][index]


def _without_positions(model):
    for value in list(model.graph.inputs):
        if value.name == "position_ids":
            zeros = ir.Value(name="zeros", const_value=ir.tensor(np.zeros((1, 1), np.int64), name="zeros"))
            zeros.shape, zeros.type = ir.Shape((1, 1)), ir.TensorType(ir.DataType.INT64)
            model.graph.initializers.add(zeros)
            value.replace_all_uses_with(zeros)
            model.graph.inputs.remove(value)


def _rename_input(old, new):
    def change(model):
        next(v for v in model.graph.inputs if v.name == old).name = new

    return change


def _around(model):
    """The last layer adds what entered the first."""
    node = _node(model, "MatMul", -1)
    added = ir.node("Add", [node.inputs[0], model.graph.inputs[0]])
    added.outputs[0].name = "around"
    model.graph.insert_before(node, added)
    node.replace_input_with(0, added.outputs[0])


def _own_lengths(model):
    value = next(v for v in model.graph.inputs if v.name == "past_key_values.2.key")
    value.shape = ir.Shape((1, decoders.KV, 128, decoders.DH))


def _branch(model):
    """The mask behind an If that depends on the tokens."""
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    size = ir.node("Size", [model.graph.inputs[0]])
    condition = ir.node("Cast", [size.outputs[0]], attributes={"to": int(ir.DataType.BOOL)})
    inner = ir.node("Identity", [mask])
    same = ir.node("Identity", [mask])
    for number, node in enumerate((size, condition, inner, same)):
        node.outputs[0].name = f"branch{number}"
    graphs = {
        name: ir.Graph([], [node.outputs[0]], nodes=[node], name=name)
        for name, node in (("then_branch", inner), ("else_branch", same))
    }
    chosen = ir.node("If", [condition.outputs[0]], attributes=graphs, name="choose")
    chosen.outputs[0].name = "chosen"
    for node, index in mask.uses():
        if node not in (inner, same):
            node.replace_input_with(index, chosen.outputs[0])
    model.graph.extend([size, condition, chosen])
    model.graph.sort()


def _softcap(model):
    _node(model, "Attention", 1).attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def _head_masks(model):
    node = _node(model, "Attention", 1)
    wide = ir.node("Concat", [node.inputs[3]] * 4, attributes={"axis": 1})
    wide.outputs[0].name, wide.outputs[0].type = "wide", ir.TensorType(ir.DataType.BOOL)
    wide.outputs[0].shape = ir.Shape(("B", 4, "S", "T"))
    model.graph.insert_before(node, wide)
    node.replace_input_with(3, wide.outputs[0])


def _unknown_attention(model):
    for node in model.graph:
        if node.op_type == "Attention":
            node.op_type, node.domain = "PagedAttention", "com.microsoft"


def _by_position(model):
    """A mask that compares positions with keys."""
    mask, positions = (next(v for v in model.graph.inputs if v.name == n) for n in ("attention_mask", "position_ids"))
    node = next(node for node, _ in mask.uses() if node.op_type == "Cast")
    seen = ir.node("LessOrEqual", [mask, positions], name="compare")
    seen.outputs[0].name = "seen"
    model.graph.insert_before(node, seen)
    node.outputs[0].replace_all_uses_with(seen.outputs[0])


def _norms_inside(model):
    node = _node(model, "GroupQueryAttention", 3)
    node.resize_inputs(16)
    for at in (14, 15):
        node.replace_input_with(at, model.graph.initializers["0.norm1"])


def _ring(model):
    _node(model, "GroupQueryAttention", 1).attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", 1)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("attention", _without_positions, "expected the input position_ids"),
        ("attention", _rename_input("inputs_embeds", "hidden_states"), "neither, but hidden_states, attention_mask"),
        ("attention", _rename_input("past_key_values.1.key", "past.1.key"), "layer 1: expected the input"),
        ("attention", _rename_input("position_ids", "use_cache_branch"), "two decoders in one If"),
        ("attention", _around, r"Add \(.*feeds later layers with values computed from inputs_embeds"),
        ("attention", _own_lengths, r"layer 2: expected past_key_values.2.key .* to grow"),
        ("attention", _by_position, r"found LessOrEqual \(compare\), which compares position_ids"),
        ("attention", _branch, r"found If \(choose\)"),
        ("attention", _softcap, r"layer 1: Attention .*expected softcap=0 .*found 30"),
        ("attention", _head_masks, r"layer 1: .*expected one mask for all heads.*found \[B,4,S,T\]"),
        ("attention", _unknown_attention, r"layer 0: expected .* Attention or Concat or .*found com.microsoft.PagedA"),
        ("group-query", _norms_inside, r"layer 3: .*expected no q_norm_weight with do_rotary=1"),
        ("group-query", _ring, r"layer 1: .* to grow with the tokens; found sliding_window_cache=1"),
        ("group-query", _rename_input("attention_mask", "mask"), "expected the input attention_mask"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_near_misses_name_the_layer_and_what_was_found(form, change, message):
    model = decoders.build(form, W)
    change(model)
    with pytest.raises(GraphError, match=message) as error:
        FastV(k=2, r=0.5)(model)
    assert "\n" not in str(error.value)


def _anonymous(model):
    """No names of nodes, and others of values."""
    outer = {*model.graph.inputs, *model.graph.outputs}
    for index, node in enumerate(model.graph):
        node.name = None
        for at, value in enumerate(node.outputs):
            if value not in outer:
                value.name = f"select/Shape_{index}" if index % 2 and not at else f"{index}.{at}"


def _in_a_function(model):
    """The whole of the decoder in a function of the model."""
    inner = {
        value: ir.Value(name=f"in_{value.name}", type=value.type, shape=value.shape) for value in model.graph.inputs
    }
    inner |= {
        value: ir.Value(name=f"w_{value.name}", type=value.type, shape=value.shape)
        for value in model.graph.initializers.values()
    }
    outputs, nodes = list(model.graph.outputs), list(model.graph)
    outer = list(inner)
    model.graph.remove(nodes)
    for node in nodes:
        for at, value in enumerate(node.inputs):
            if value in inner:
                node.replace_input_with(at, inner[value])
    call = ir.node("Whole", outer, domain="custom", num_outputs=len(outputs), name="call")
    model.graph.outputs.clear()
    graph = ir.Graph(
        list(inner.values()), outputs, nodes=nodes, opset_imports=dict(model.graph.opset_imports), name="f"
    )
    for old, new in zip(outputs, call.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"out_{old.name}"
        model.graph.outputs.append(new)
    model.graph.append(call)
    function = ir.Function("custom", "Whole", graph=graph, attributes=[])
    model.functions[function.identifier()] = function
    model.graph.opset_imports["custom"] = 1


@pytest.mark.parametrize("change", [_anonymous, _in_a_function])
@pytest.mark.parametrize("form", ["attention", "written-out", "group-query"])
def test_odd_graphs_are_trimmed_as_well(form, change, tmp_path):
    model = decoders.build(form, W)
    change(model)
    ir.save(model, tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), str(tmp_path / "out.onnx")]) == 0
    have = Loop(session(tmp_path / "out.onnx"), 1)(prompt(), VISUAL)
    want = Loop(session(FastV(k=2, r=0.5)(decoders.build(form, W))), 1)(prompt(), VISUAL)
    for name, value in want.items():
        np.testing.assert_array_equal(have[name], value, err_msg=name)


@pytest.mark.parametrize("form", ["attention", "written-out", "group-query"])
@pytest.mark.parametrize(
    "fields",
    [
        {"names": {"B": "unk__0", "S": "decoder_sequence_length // 1", "P": "past + 1", "T": "?"}},
        {"names": {"B": "kept_tokens", "S": "kept_past", "P": "visual_tokens", "T": "N"}},
        {"constants": True},
    ],
    ids=["odd", "taken", "constants"],
)
def test_names_of_dimensions_and_weights_in_nodes(form, fields):
    model = FastV(k=2, r=0.5)(decoders.build(form, W, **fields))
    loops = Loop(session(FastV(k=2, r=0.5)(decoders.build(form, W))), 1), Loop(session(model), 1)
    for step in range(3):
        rows = [row[:1] for row in prompt()] if step else prompt()
        want, have = (loop(rows, None if step else VISUAL) for loop in loops)
        for name, value in want.items():
            np.testing.assert_array_equal(have[name], value, err_msg=name)


def test_float16():
    """In the reference evaluator: ONNX Runtime's CPU kernels keep float32 between some operators of float16."""
    half = decoders.weights(dtype=np.float16)
    feeds = {
        "inputs_embeds": prompt(np.float16)[0][None],
        "attention_mask": np.ones((1, 9), np.int64),
        "position_ids": np.arange(9)[None],
        **{f"past_key_values.{i}.{k}": np.zeros((1, 2, 0, 16), np.float16) for i in range(4) for k in ("key", "value")},
    }
    plain = decoders.build("written-out", half)
    pruned = FastV(k=2, r=0.0)(decoders.build("written-out", half))
    want, have = (ReferenceEvaluator(ir.to_proto(model)) for model in (plain, pruned))
    outputs = have.run(None, feeds | {"visual_positions": np.array(VISUAL)})
    for name, a, b in zip(want.output_names, want.run(None, feeds), outputs, strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("form", ["attention", "written-out"])
def test_float16_keeps_what_float32_keeps(form):
    half = decoders.weights(dtype=np.float16)
    kept = Loop(session(FastV(k=2, r=0.5)(decoders.build(form, half))), 1)(prompt(np.float16), VISUAL)["kept_indices"]
    whole = Loop(session(FastV(k=2, r=0.5)(decoders.build(form, W))), 1)(prompt(), VISUAL)["kept_indices"]
    assert kept.tolist() == whole.tolist()
