"""files.py: graphs are saved beside their weights, or with a copy of them."""

import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vlmtrim.graphs import load, save


def graph(folder, size):
    """A graph that adds a weight of ``size`` float32 values, which lie in a file of their own."""
    folder.mkdir()
    values = np.arange(size, dtype=np.float32)
    (folder / "weights.bin").write_bytes(values.tobytes())
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[size], data_location=1)
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(4 * size))):
        weight.external_data.add(key=key, value=value)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 24]> g (float[N] x) => (float[N] y) { y = Add(x, w) }'
    )
    proto = ir.to_proto(model)
    proto.graph.initializer.append(weight)
    onnx.save(proto, folder / "g.onnx")
    return folder / "g.onnx"


def weight_of(path):
    (tensor,) = onnx.load(path).graph.initializer
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize(("size", "files"), [(4, ["out.onnx"]), (1 << 19, ["out.onnx", "out.onnx.data"])])
def test_weights_of_another_folder_come_along_and_no_empty_file_does(tmp_path, size, files):
    path = graph(tmp_path / "a", size)
    (tmp_path / "b").mkdir()
    save(load(path), tmp_path / "b" / "out.onnx")
    assert sorted(os.listdir(tmp_path / "b")) == files
    assert (weight_of(tmp_path / "b" / "out.onnx") == np.arange(size)).all()


def test_weights_beside_are_referred_to(tmp_path):
    path = graph(tmp_path / "a", 1 << 19)
    save(load(path), tmp_path / "a" / "out.onnx")
    assert sorted(os.listdir(tmp_path / "a")) == ["g.onnx", "out.onnx", "weights.bin"]
    assert (tmp_path / "a" / "out.onnx").stat().st_size < 1000


def test_hard_linked_weights_are_not_copied_and_the_refusal_says_what_to_do(tmp_path):
    path = graph(tmp_path / "a", 4)
    os.link(tmp_path / "a" / "weights.bin", tmp_path / "second")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"weights\.bin is hard-linked.*save to .*/a.*--link-weights"):
        save(load(path), tmp_path / "b" / "out.onnx")
    assert os.listdir(tmp_path / "b") == []
    save(load(path), tmp_path / "a" / "out.onnx")
