"""weights.py: headers are read, files linked, casts streamed, and every kind of damage gets one sentence."""

from __future__ import annotations

import json
import struct

import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from vlmtrim.export import weights
from vlmtrim.export.families import llava
from vlmtrim.export.job import Refusal


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def build(text: str = "llama", tied: bool = False, **settings) -> LlavaForConditionalGeneration:
    config = llava.tiny_config(text=text, layers=2)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def check_parameters(model, folder) -> None:
    tensors = weights.read_checkpoint(folder)
    matched = weights.match_parameters(model, tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(matched) == set(parameters)
    for name, value in parameters.items():
        assert torch.equal(tensors[matched[name]].read(), value), name


def test_a_header_says_where_every_tensor_lies(whole):
    path = whole / "model.safetensors"
    tensors = weights.read_header(path)
    expected = load_file(path)
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].shape == tuple(value.shape)
        assert tensors[name].length == value.numel() * value.element_size()
        assert torch.equal(tensors[name].read(), value)


def test_every_parameter_finds_its_tensor_in_one_file(model, whole):
    check_parameters(model, whole)


def test_every_parameter_finds_its_tensor_in_shards(model, sharded):
    check_parameters(model, sharded)


def test_tied_embeddings_share_one_tensor(tmp_path):
    model = build("qwen2", tied=True)
    model.save_pretrained(tmp_path)
    tensors = weights.read_checkpoint(tmp_path)
    assert not any(name.endswith("lm_head.weight") for name in tensors)
    matched = weights.match_parameters(model, tensors)
    assert matched["lm_head.weight"] == matched["model.language_model.embed_tokens.weight"]
    check_parameters(model, tmp_path)


def test_the_names_of_old_llava_checkpoints_are_understood(model, tmp_path):
    old = {}
    for name, value in model.state_dict().items():
        for new, was in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ):
            if name.startswith(new):
                rest = name.removeprefix(new).removeprefix("vision_model.")
                old[was + rest] = value.contiguous()
    assert len(old) == len(model.state_dict())
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_parameters(model, tmp_path)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_an_unchanged_dtype_links_the_files_and_transformers_loads_them(kind, model, request, tmp_path):
    source = request.getfixturevalue(kind)
    stored = weights.store(weights.read_checkpoint(source), torch.float32, tmp_path, quiet)
    for path in source.glob("*.safetensors"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
        if path.stat().st_dev == tmp_path.stat().st_dev:
            assert (tmp_path / path.name).stat().st_ino == path.stat().st_ino
    assert all(tensor.file.parent == tmp_path for tensor in stored.values())
    model.config.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_files_are_copied_where_links_are_refused(whole, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    weights.store(weights.read_checkpoint(whole), torch.float32, tmp_path, quiet)
    copied, source = tmp_path / "model.safetensors", whole / "model.safetensors"
    assert copied.read_bytes() == source.read_bytes()
    assert copied.stat().st_ino != source.stat().st_ino


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_streamed_cast_is_torchs_cast_and_names_stay(model, sharded, tmp_path, dtype):
    stored = weights.store(weights.read_checkpoint(sharded), dtype, tmp_path, quiet)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(stored) == set(weights.read_checkpoint(sharded))
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in weights.read_checkpoint(sharded).items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor.read().to(dtype))
        assert torch.equal(stored[name].read(), written[name])
    model.config.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(value.to(dtype), loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_integers_keep_their_dtype_and_special_values_survive_a_cast(tmp_path):
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-9, 65504.0])
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_file(
        {"a": special, "ids": torch.arange(3), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)},
        source / "model.safetensors",
    )
    weights.store(weights.read_checkpoint(source), torch.float16, target, quiet)
    written = load_file(target / "model.safetensors")
    assert torch.equal(written["ids"], torch.arange(3))
    assert torch.equal(written["scalar"], torch.tensor(2.5, dtype=torch.float16))
    assert torch.equal(written["a"].nan_to_num(7), special.half().nan_to_num(7))


def refusal(call) -> str:
    with pytest.raises(Refusal) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_overflow_is_refused_by_the_tensors_name(tmp_path):
    save_file({"fine": torch.ones(3), "model.huge": torch.tensor([1.0, 7e4])}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    message = refusal(lambda: weights.store(weights.read_checkpoint(tmp_path), torch.float16, out, quiet))
    assert "model.huge" in message
    assert "bfloat16" in message


def test_an_overflow_is_clipped_where_asked_and_counted(tmp_path, capsys):
    values = torch.tensor([1.0, 7e4, -1e6, float("inf"), 1e-9, 0.0], dtype=torch.bfloat16)
    save_file({"a": values}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    weights.store(weights.read_checkpoint(tmp_path), torch.float16, out, quiet, clip=True)
    expected = torch.tensor([1.0, 65504.0, -65504.0, float("inf"), 0.0, 0.0], dtype=torch.float16)
    assert torch.equal(load_file(out / "model.safetensors")["a"], expected)
    said = capsys.readouterr().err
    assert "2 values were clipped to 65504" in said and "1 small values became zero" in said


def test_files_are_copied_where_asked(whole, tmp_path):
    weights.store(weights.read_checkpoint(whole), torch.float32, tmp_path, quiet, copy=True)
    copied, source = tmp_path / "model.safetensors", whole / "model.safetensors"
    assert copied.read_bytes() == source.read_bytes() and copied.stat().st_nlink == 1


def test_a_missing_shard_is_refused_by_name(sharded, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes((sharded / "model.safetensors.index.json").read_bytes())
    shards = sorted(sharded.glob("*.safetensors"))
    for path in shards[:-1]:
        (tmp_path / path.name).hardlink_to(path)
    assert shards[-1].name in refusal(lambda: weights.read_checkpoint(tmp_path))


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_index_is_refused_by_name(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(lambda: weights.read_checkpoint(tmp_path))


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(lambda: weights.read_checkpoint(tmp_path))
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_a_folder_without_weights_is_refused(tmp_path):
    assert str(tmp_path) in refusal(lambda: weights.read_checkpoint(tmp_path))


@pytest.mark.parametrize("keep", [0, 5, 8, 60, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(whole, tmp_path, keep):
    content = (whole / "model.safetensors").read_bytes()
    size = int(len(content) * keep) if isinstance(keep, float) else keep
    (tmp_path / "model.safetensors").write_bytes(content[:size])
    assert str(tmp_path / "model.safetensors") in refusal(lambda: weights.read_checkpoint(tmp_path))


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe", b"{"])
def test_a_damaged_header_is_refused_by_name(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert str(tmp_path / "model.safetensors") in refusal(lambda: weights.read_checkpoint(tmp_path))


def test_an_unknown_dtype_is_refused_by_the_tensors_name(tmp_path):
    header = json.dumps({"odd": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    message = refusal(lambda: weights.read_checkpoint(tmp_path))
    assert "odd" in message
    assert "F8_E4M3" in message


def test_a_missing_tensor_is_refused_by_name(model, whole):
    tensors = weights.read_checkpoint(whole)
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[gone]
    assert "layers.1.mlp.up_proj.weight" in refusal(lambda: weights.match_parameters(model, tensors))


def test_a_tensor_of_another_shape_is_refused_by_name_with_both_shapes(whole):
    config = llava.tiny_config(layers=2)
    config.text_config.intermediate_size = 100
    message = refusal(
        lambda: weights.match_parameters(LlavaForConditionalGeneration(config), weights.read_checkpoint(whole))
    )
    assert "384" in message
    assert "100" in message


def traced(shape, dtype):
    """A graph with one weight, as a trace leaves it."""
    weight = ir.val("full.a.weight", dtype=dtype, shape=shape)
    return ir.Model(ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 24}, name="g"), ir_version=10)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((2, 3), ir.DataType.FLOAT16, True),
        ((3, 2), ir.DataType.FLOAT16, False),
        ((2, 3), ir.DataType.FLOAT, False),
    ],
)
def test_a_weight_that_the_graph_reads_otherwise_is_refused_before_anything_is_written(tmp_path, shape, dtype, fits):
    save_file({"old.a.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    tensors = weights.read_checkpoint(tmp_path)

    def check():
        weights.check_bindings(traced(shape, dtype), {"a.weight": "old.a.weight"}, tensors, torch.float16)

    if fits:
        check()
    else:
        message = refusal(check)
        assert "old.a.weight" in message and "float16 [2, 3]" in message
