"""external.py: the files that an ONNX file refers to, against what onnx itself writes."""

from __future__ import annotations

import onnx
import pytest

from vlmtrim.graphs.external import external_files


def tensor(location: str, **more: str) -> onnx.TensorProto:
    made = onnx.TensorProto(name="w", dims=[2], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        made.external_data.add(key=key, value=value)
    return made


def model() -> onnx.ModelProto:
    made = onnx.ModelProto(ir_version=10, producer_name="test")
    made.graph.name = "main"
    made.graph.node.add(op_type="Relu", input=["x"], output=["y"])
    return made


def test_without_external_data_there_are_none():
    made = model()
    made.graph.initializer.add(name="w", dims=[2], data_type=1, raw_data=b"location" * 100)
    assert external_files(made.SerializeToString()) == set()
    assert external_files(b"") == set()


@pytest.mark.parametrize("place", ["initializer", "constant", "tensors", "subgraph", "sparse", "function", "training"])
def test_wherever_a_tensor_may_stand_its_file_is_found(place):
    made, found = model(), tensor("elsewhere.bin", offset="0", length="8")
    attribute = made.graph.node[0].attribute.add(name="a")
    if place == "initializer":
        made.graph.initializer.append(found)
    elif place == "constant":
        attribute.t.CopyFrom(found)
    elif place == "tensors":
        attribute.tensors.append(found)
    elif place == "subgraph":
        attribute.g.initializer.append(found)
    elif place == "sparse":
        made.graph.sparse_initializer.add().indices.CopyFrom(found)
    elif place == "function":
        made.functions.add().node.add().attribute.add().t.CopyFrom(found)
    else:
        made.training_info.add().algorithm.initializer.append(found)
    assert external_files(made.SerializeToString()) == {"elsewhere.bin"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "a\0b", "ü.bin"])
def test_names_come_as_they_stand_there(name):
    made = model()
    made.graph.initializer.append(tensor(name))
    assert external_files(made.SerializeToString()) == {name}


def test_of_an_entry_with_two_values_the_last_counts_as_in_protobuf():
    entry = b"\x0a\x08location\x12\x05a.bin\x12\x05b.bin"
    made = model()
    made.graph.initializer.add().MergeFromString(b"\x6a" + bytes([len(entry)]) + entry)
    assert made.graph.initializer[0].external_data[0].value == "b.bin"
    # the same bytes, unparsed: protobuf itself would have written one value
    initializer = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(initializer)]) + initializer
    assert external_files(b"\x3a" + bytes([len(graph)]) + graph) == {"b.bin"}


@pytest.mark.parametrize(
    "data", [b"\x3a\x05abc", b"\x3a", b"\x80", b"\xff" * 12, b"\x0b", b"\x3a\x02\x2a\x05", b"\x0d\x00"]
)
def test_bytes_that_are_no_protobuf_are_refused(data):
    with pytest.raises(ValueError):
        external_files(data)


def test_graphs_that_nest_without_end_are_refused():
    data = b""
    for _ in range(300):  # an attribute's graph in an attribute's graph ...
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            data = tag + varint(len(data)) + data
    with pytest.raises(ValueError, match="deep"):
        external_files(b"\x3a" + varint(len(data)) + data)


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])
