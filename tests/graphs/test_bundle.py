"""bundle.py: a bundle is whole, unchanged, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmtrim.graphs import bundle as bundle_module
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.bundle import BundleError, open_bundle, seal
from vlmtrim.graphs.contract import CacheGroup, Contract, GraphSpec, TensorSpec

SUMS = "SHA256SUMS"
NAMES = ("contract.json", "decoder.onnx", "embed.onnx", "vision.onnx", "weights.safetensors")


ONNX = b"\x08\x0a\x12\x04test"  # a ModelProto of nothing but ir_version 10 and a producer


def contract_text(**changes) -> str:
    groups = (CacheGroup((0,), 8, 1, 4),)
    features = TensorSpec("image_features", "float32", ("I", 4, 4))
    graphs = {
        "vision": GraphSpec("vision.onnx", (TensorSpec("pixel_values", "float32", ("I", 3, 2, 2)),), (features,)),
        "embed": GraphSpec(
            "embed.onnx",
            (
                TensorSpec("input_ids", "int64", ("B", "S")),
                TensorSpec("image_features", "float32", ("B", "N", 4)),
                TensorSpec("visual_positions", "int64", ("B", "N")),
            ),
            (TensorSpec("inputs_embeds", "float32", ("B", "S", 4)),),
        ),
        "decoder": decoder_spec(dtype="float32", hidden=4, vocabulary=9, groups=groups, selects=False),
    }
    contract = Contract(
        family="llava",
        dtype="float32",
        graphs=graphs,
        groups=groups,
        dims={"I": (1, 2), "B": (1, 1), "S": (1, 8), "N": (0, 4), "W0": (1, 8)},
        selection=None,
        max_seq_len=8,
        images_assumed=1,
        image_tokens=4,
        image_token_id=8,
        eos_token_ids=(2,),
    )
    return dataclasses.replace(contract, **changes).to_json()


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "contract.json").write_text(contract_text())
    for name in ("vision", "embed", "decoder"):
        (folder / f"{name}.onnx").write_bytes(ONNX)
    (folder / "weights.safetensors").write_bytes(b"weights" * 100)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    made = fill(tmp_path / "bundle")
    seal(made)
    return made


def test_a_sealed_bundle_opens_with_its_contract_and_checksums(folder):
    bundle = open_bundle(folder)
    assert bundle.contract == Contract.from_json(contract_text())
    assert set(bundle.sums) == set(NAMES)
    for name, digest in bundle.sums.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert bundle.file("decoder.onnx") == folder / "decoder.onnx"
    assert open_bundle(str(folder)) == bundle


def test_the_digest_depends_on_every_byte_and_not_on_the_place(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert open_bundle(copy).digest == open_bundle(folder).digest
    (copy / "weights.safetensors").write_bytes(b"other")
    seal(copy)
    assert open_bundle(copy).digest != open_bundle(folder).digest


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_accepts_the_checksums_and_notices_damage(folder):
    command = ["sha256sum", "-c", SUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    (folder / "decoder.onnx").write_bytes(b"x")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode != 0


@pytest.mark.parametrize("name", ["contract.json", "decoder.onnx", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["edited", "truncated", "emptied", "removed", "grown"])
def test_a_changed_file_is_refused_by_name(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(
            {"edited": flipped, "truncated": content[:-1], "emptied": b"", "grown": content + b"\n"}[damage]
        )
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert str(path) in str(caught.value)
    assert "export the model again" in str(caught.value)


def test_missing_checksums_are_refused_by_name(folder):
    (folder / SUMS).unlink()
    with pytest.raises(BundleError, match=SUMS):
        open_bundle(folder)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(BundleError, match="no such folder") as caught:
        open_bundle(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("line", ["garbage", "0" * 64, "0" * 64 + " one-space", "0" * 64 + "  ../secret"])
def test_a_damaged_checksum_line_is_refused_with_the_line(folder, line):
    with (folder / SUMS).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert SUMS in str(caught.value)
    assert repr(line)[:60] in str(caught.value)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file as an attacker would: with its checksum."""
    (folder / name).write_bytes(content)
    seal(folder)


@pytest.mark.parametrize("line", ["A" * 64 + "  big-letters", "0" * 64 + "  a/b", "0" * 64 + " *binary", "x  y"])
def test_a_line_that_sha256sum_would_not_write_is_refused(folder, line):
    with (folder / SUMS).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(BundleError, match="SHA256SUMS is damaged"):
        open_bundle(folder)


def test_a_line_that_is_there_twice_is_refused(folder):
    with (folder / SUMS).open("r+") as stream:
        stream.write(stream.readlines()[0])
    with pytest.raises(BundleError, match="SHA256SUMS is damaged"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["vision.onnx", "weights.safetensors"])
def test_a_file_that_would_be_used_must_be_listed(folder, name):
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with pytest.raises(BundleError, match=rf"{name} is not listed in SHA256SUMS"):
        open_bundle(folder)


def test_an_unlisted_template_is_refused_and_a_readme_is_not(folder):
    (folder / "README.md").write_text("about this bundle")
    open_bundle(folder)
    (folder / "chat_template.jinja").symlink_to("chat_template.jinja")
    with pytest.raises(BundleError, match=r"chat_template\.jinja is not listed"):
        open_bundle(folder)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_listed_file_that_is_none_is_refused_at_once(folder, tmp_path, kind):
    path = folder / "weights.safetensors"
    (tmp_path / "outside").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(BundleError, match="is a link" if kind == "link" else "no regular file"):
        open_bundle(folder)


@pytest.mark.parametrize("file", ["../other/decoder.onnx", "/etc/passwd", "other.onnx"])
def test_a_graph_from_elsewhere_is_refused(folder, tmp_path, file):
    shutil.copytree(folder, tmp_path / "other")
    raw = json.loads(contract_text())
    raw["graphs"]["decoder"]["file"] = file
    rewrite(folder, "contract.json", json.dumps(raw).encode())
    with pytest.raises(BundleError, match="expected a plain name" if "/" in file else "not listed"):
        open_bundle(folder)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "nowhere.bin", "SHA256SUMS"])
def test_weights_from_elsewhere_are_refused(folder, location):
    import onnx

    model = onnx.ModelProto(ir_version=10)
    weight = model.graph.initializer.add(name="w", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    rewrite(folder, "decoder.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"decoder\.onnx takes weights from .*, which is no file of the bundle"):
        open_bundle(folder)
    weight.external_data[0].value = "weights.safetensors"
    rewrite(folder, "decoder.onnx", model.SerializeToString())
    open_bundle(folder)


def test_a_graph_that_is_no_protobuf_is_refused(folder):
    rewrite(folder, "vision.onnx", b"\xff" * 40)
    with pytest.raises(BundleError, match=r"vision\.onnx is no ONNX file"):
        open_bundle(folder)


def test_parts_of_a_contract_that_contradict_are_refused(folder):
    rewrite(folder, "contract.json", contract_text(image_tokens=1000).encode())
    with pytest.raises(BundleError, match="returns 4 features a picture, image_tokens is 1000"):
        open_bundle(folder)


def test_verify_hashes_what_is_remembered_too(folder, monkeypatch):
    monkeypatch.setattr(bundle_module, "known_sha256", lambda path, _: bundle_module.sha256(folder / "honest"))
    (folder / "honest").write_bytes(b"")
    (folder / SUMS).write_text("".join(f"{hashlib.sha256(b'').hexdigest()}  {n}\n" for n in NAMES))
    assert open_bundle(folder)  # believed: every digest is remembered as that of the empty file
    with pytest.raises(BundleError, match="is damaged or was edited"):
        open_bundle(folder, verify=True)


def test_checksums_that_are_no_text_are_refused_by_name(folder):
    (folder / SUMS).write_bytes(b"\xff\xfe\x80" * 20)
    with pytest.raises(BundleError, match=SUMS):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["contract.json", "decoder.onnx"])
def test_a_required_file_outside_the_checksums_is_refused_by_name(folder, name):
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with pytest.raises(BundleError, match=name):
        open_bundle(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", json.dumps({"schema": 77})])
def test_a_contract_that_cannot_be_read_is_refused_by_name(folder, text):
    (folder / "contract.json").write_text(text)
    seal(folder)
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert str(folder / "contract.json") in str(caught.value)


def test_a_contract_of_another_schema_names_both_schemas(folder):
    raw = json.loads(contract_text())
    raw["schema"] = 77
    (folder / "contract.json").write_text(json.dumps(raw))
    seal(folder)
    with pytest.raises(BundleError, match=r"schema 77.*schema 2"):
        open_bundle(folder)
