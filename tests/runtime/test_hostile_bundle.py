"""Bundles whose contract is of one piece but not that of their graphs: refused before memory is read by its sizes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from vlmtrim import runtime
from vlmtrim.graphs.boundary import decoder_spec
from vlmtrim.graphs.bundle import BundleError, open_bundle, seal
from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.backends.base import check_boundary
from vlmtrim.runtime.backends.ort import OrtBackend
from vlmtrim.runtime.errors import RuntimeRefusal


def forged(source, target, change):
    """A copy of a bundle with another contract and fitting checksums, as an attacker would make it."""
    shutil.copytree(source, target)
    contract = Contract.from_json((target / "contract.json").read_text())
    (target / "contract.json").write_text(change(contract).to_json())
    seal(target)
    return target


def coherent(contract: Contract, **group) -> Contract:
    """The contract with its last group changed, and everything that follows from it."""
    groups = (*contract.groups[:-1], dataclasses.replace(contract.groups[-1], **group))
    old = {tensor.name: tensor for tensor in (*contract.graphs["decoder"].inputs, *contract.graphs["decoder"].outputs)}
    decoder = decoder_spec(
        dtype=contract.dtype,
        hidden=old["inputs_embeds"].shape[-1],
        vocabulary=old["logits"].shape[-1],
        groups=groups,
        selects=True,
    )
    dims = {**contract.dims, f"W{len(groups) - 1}": (1, groups[-1].capacity)}
    return dataclasses.replace(contract, groups=groups, dims=dims, graphs={**contract.graphs, "decoder": decoder})


def ask(folder, picture):
    return list(runtime.open(folder).generate("What is it?", [picture], max_new_tokens=2))


def test_a_size_that_is_not_the_graphs_is_refused_when_it_is_opened(fastv_bundle, tmp_path, picture):
    folder = forged(fastv_bundle, tmp_path / "b", lambda c: coherent(c, capacity=c.groups[-1].capacity - 1))
    open_bundle(folder)  # of one piece
    with pytest.raises(RuntimeRefusal, match=r"decoder\.onnx: the graph has .*, the contract promises"):
        ask(folder, picture)


def test_a_share_that_is_not_the_graphs_is_refused_in_the_first_prefill(fastv_bundle, tmp_path, picture):
    folder = forged(fastv_bundle, tmp_path / "b", lambda c: coherent(c, removed=0.75))
    with pytest.raises(RuntimeRefusal, match=r"the decoder kept 8 of|the decoder kept \d+ of .* promises \d+"):
        ask(folder, picture)


@pytest.mark.parametrize("tokens", [1000, 100000])
def test_more_visual_tokens_than_the_vision_graph_returns_are_refused(fastv_bundle, tmp_path, picture, tokens):
    """Finding 1: read past a heap buffer, and a SIGSEGV."""

    def change(contract):
        dims = {**contract.dims, "N": (0, tokens), "S": (1, tokens + 100)}
        groups = tuple(dataclasses.replace(group, removed=1.0) for group in contract.groups)
        return dataclasses.replace(contract, image_tokens=tokens, dims=dims, groups=groups)

    with pytest.raises(BundleError, match=r"contract\.json: "):
        ask(forged(fastv_bundle, tmp_path / "b", change), picture)


def test_caches_beyond_the_memory_are_refused_before_they_are_made(fastv_bundle, monkeypatch):
    monkeypatch.setattr("vlmtrim.runtime.backends.base.free_memory", lambda: 1000)
    with pytest.raises(RuntimeRefusal, match=r"the caches of 1 row\(s\) take .* GB of memory are free"):
        runtime.open(fastv_bundle)


def test_a_view_of_other_size_is_refused():
    backend = OrtBackend("ort-cpu")
    tensor = backend.zeros((2, 3), "float32")
    assert backend.to_host(backend.reshape(tensor, (3, 2))).shape == (3, 2)
    for shape in ((2, 4), (6, 2), (0,), (1, 1)):
        with pytest.raises(RuntimeRefusal, match=r"\[2, 3\] cannot be read as"):
            backend.reshape(tensor, shape)


def test_what_a_graph_returns_is_held_to_the_contract(fastv_bundle):
    """A graph may declare one shape and compute another; ONNX Runtime only warns."""
    session = runtime.open(fastv_bundle).session
    embed = session._graph("embed")
    embed.spec = dataclasses.replace(
        embed.spec, outputs=(dataclasses.replace(embed.spec.outputs[0], shape=("B", "S", 7)),)
    )
    with pytest.raises(RuntimeRefusal, match=r"embed\.onnx returned inputs_embeds as float32 .*promises .*7\]"):
        session.prefill([[1, 2, 3]])


def test_an_error_of_the_library_is_a_refusal_of_one_line(fastv_bundle):
    session = runtime.open(fastv_bundle).session
    with pytest.raises(RuntimeRefusal, match=r"embed\.onnx: ONNX Runtime cannot run it: .*") as caught:
        session.decode(np.array([10**9]))  # no such row in the table of embeddings
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("opened", "says"),
    [
        ({"a": ("float32", ["B", 4])}, "differ in b"),
        ({"a": ("float32", ["B", 4]), "b": ("int64", ["B"]), "c": ("int64", [])}, "differ in c"),
        ({"a": ("float16", ["B", 4]), "b": ("int64", ["B"])}, r"has a as float16 \[B, 4\]"),
        ({"a": ("float32", ["B", 5]), "b": ("int64", ["B"])}, r"has a as float32 \[B, 5\]"),
        ({"a": ("float32", ["S", 4]), "b": ("int64", ["B"])}, r"has a as float32 \[S, 4\]"),
        ({"a": ("float32", ["B", None]), "b": ("int64", ["B"])}, r"has a as float32 \[B, None\]"),
        ({"a": ("float32", ["B"]), "b": ("int64", ["B"])}, r"has a as float32 \[B\]"),
    ],
)
def test_a_boundary_that_differs_is_refused_with_the_tensor(opened, says):
    from vlmtrim.graphs.contract import TensorSpec

    promised = [TensorSpec("a", "float32", ("B", 4)), TensorSpec("b", "int64", ("B",))]
    with pytest.raises(RuntimeRefusal, match=says):
        check_boundary("x.onnx", promised, opened, whole=True)
    check_boundary("x.onnx", promised, {"a": ("float32", [None, 4])}, whole=False)


def test_image_features_that_are_not_there_are_refused(export_tiny, picture):
    folder = export_tiny("trimmed", family="mllama", method="trimmed-llama", ratio=0.25, max_seq_len=256)
    chat = runtime.open(folder)
    real = chat.session.backend.to_host

    def lie(tensor):
        array = real(tensor)
        return array + 10**6 if array.dtype == np.int64 and array.ndim == 2 else array

    chat.session.backend.to_host = lie
    with pytest.raises(RuntimeRefusal, match="names kept image features that there are not"):
        list(chat.generate("What is it?", [picture], max_new_tokens=1))


def test_a_token_that_the_model_does_not_have_is_refused_before_it_is_looked_up(fastv_bundle, tmp_path):
    """On a device, the look-up would read what lies behind the embeddings."""
    folder = tmp_path / "b"
    shutil.copytree(fastv_bundle, folder)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["H"] = 70_000
    path.write_text(json.dumps(raw))
    seal(folder)
    with pytest.raises(RuntimeRefusal, match=r"holds token 70000, the model has \d+"):
        runtime.open(folder).generate("Hi")
