"""weights.py: headers are read, files linked, casts streamed, and every kind of damage gets one sentence."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from vlmtrim.export import weights
from vlmtrim.export.families import llava
from vlmtrim.export.job import Refusal
from vlmtrim.export.weights import taking


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


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_files_of_the_dtype_are_taken_as_they_are_and_transformers_loads_them(kind, link, model, request, tmp_path):
    source = request.getfixturevalue(kind)
    stored = weights.store(weights.read_checkpoint(source), weights.Wanted(torch.float32), tmp_path, quiet, link)
    for path in source.glob("*.safetensors"):
        taken = tmp_path / path.name
        assert taken.read_bytes() == path.read_bytes()
        assert (taken.stat().st_ino == path.stat().st_ino) == link
        assert link or taken.stat().st_nlink == 1  # onnx refuses more
    assert all(tensor.file.parent == tmp_path for tensor in stored.values())
    model.config.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_copy_tells_how_far_it_is(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(taking, "COPY_BYTES", 4096)
    monkeypatch.setattr(taking, "_clone", lambda *_: False)
    told = []
    weights.store(
        weights.read_checkpoint(sharded), weights.Wanted(torch.float32), tmp_path, lambda *now: told.append(now)
    )
    total = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert len(told) > 10 and told == sorted(told) and told[-1] == (total, total)


def test_a_file_system_that_clones_is_asked_first(whole, tmp_path, monkeypatch):
    """The kernel call stands in for a file system with reflinks; what it makes must be taken, not overwritten."""

    def clone(target, request, source):
        assert request == 0x40049409
        data = os.pread(source, 1 << 30, 0)
        os.write(target, data)

    monkeypatch.setattr(taking.fcntl, "ioctl", clone)
    monkeypatch.setattr(taking, "_copy", None)
    files = weights.files_of(weights.read_checkpoint(whole))
    assert taking.how(files, tmp_path, link=False) == "cloned" and list(tmp_path.iterdir()) == []
    weights.store(weights.read_checkpoint(whole), weights.Wanted(torch.float32), tmp_path, quiet)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_links_that_cannot_be_made_are_refused_and_copies_take_their_place(whole, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr(taking, "_clone", lambda *_: False)
    files = weights.files_of(weights.read_checkpoint(whole))
    message = refusal(lambda: taking.how(files, tmp_path, link=True))
    assert "--link-weights" in message and str(tmp_path) in message and "two file systems" in message
    assert taking.how(files, tmp_path, link=False) == "copied"
    assert list(tmp_path.iterdir()) == []


def test_another_file_system_is_told_before_the_work(whole):
    """Finding 16, on a real second file system where there is one."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == whole.stat().st_dev:
        pytest.skip("no second file system here")
    files = weights.files_of(weights.read_checkpoint(whole))
    assert taking.how(files, other, link=False) == "copied"
    assert "two file systems" in refusal(lambda: taking.how(files, other, link=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_streamed_cast_is_torchs_cast_and_names_stay(model, sharded, tmp_path, dtype):
    stored = weights.store(weights.read_checkpoint(sharded), weights.Wanted(dtype), tmp_path, quiet)
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
    weights.store(weights.read_checkpoint(source), weights.Wanted(torch.float16), target, quiet)
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
    message = refusal(
        lambda: weights.store(weights.read_checkpoint(tmp_path), weights.Wanted(torch.float16), out, quiet)
    )
    assert "model.huge" in message
    assert "bfloat16" in message


def test_an_overflow_is_clipped_where_asked_and_counted(tmp_path, capsys):
    values = torch.tensor([1.0, 7e4, -1e6, float("inf"), 1e-9, 0.0], dtype=torch.bfloat16)
    save_file({"a": values}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    weights.store(weights.read_checkpoint(tmp_path), weights.Wanted(torch.float16, clip=True), out, quiet)
    expected = torch.tensor([1.0, 65504.0, -65504.0, float("inf"), 0.0, 0.0], dtype=torch.float16)
    assert torch.equal(load_file(out / "model.safetensors")["a"], expected)
    said = capsys.readouterr().err
    assert "2 values were clipped to 65504" in said and "1 small values became zero" in said


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
    header = json.dumps({"odd": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    message = refusal(lambda: weights.read_checkpoint(tmp_path))
    assert "odd" in message
    assert "F8_E8M0" in message


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
