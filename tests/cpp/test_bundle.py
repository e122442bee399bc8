"""The C++ runtime opens what the Python one opens, and refuses what it refuses."""

import ctypes
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from probing import ProbeError, array, call, result

from vlmtrim.graphs.bundle import BundleError, open_bundle, seal
from vlmtrim.graphs.caches import load_policy
from vlmtrim.graphs.external import external_files
from vlmtrim.runtime import dtypes


def opened(folder, verify=False):
    call("probe_bundle", str(folder).encode(), int(verify))


@pytest.fixture
def bundle(fastv_bundle, tmp_path):
    return shutil.copytree(fastv_bundle, tmp_path / "bundle")


def edited(path, old, new):
    raw = json.loads(path.read_text())
    place = raw
    *way, last = old
    for step in way:
        place = place[step]
    if new is None:
        del place[last]
    else:
        place[last] = new
    path.write_text(json.dumps(raw))


def test_sha256_is_hashlibs():
    random = np.random.default_rng(0)
    for size in [0, 1, 55, 56, 63, 64, 65, 1000, 4097, 100_000]:
        data = random.bytes(size)
        call("probe_sha256", data, ctypes.c_size_t(size))
        assert result("digest").decode() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_casts_are_numpys(dtype):
    random = np.random.default_rng(1)
    values = random.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.float32([0, -0.0, 65504, 65519.9, 65520, 6e-8, 3e-8, 2.9e-8, np.inf, -np.inf])])
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        expected = dtypes.raw(dtypes.cast(values, dtype)).view(np.uint16)
    call("probe_cast", values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(values.size), dtype.encode())
    np.testing.assert_array_equal(array("bits", np.uint16), expected)
    back = dtypes.from_raw(expected.view(np.uint8), expected.shape, dtype).astype(np.float32)
    np.testing.assert_array_equal(array("back", np.float32), back)


def test_a_bundle_opens(bundle):
    opened(bundle)
    opened(bundle, verify=True)


EDITS = [
    (("schema",), 1),
    (("family",), None),
    (("unknown",), 3),
    (("dtype",), "float64"),
    (("max_seq_len",), 0),
    (("max_seq_len",), True),
    (("image_tokens",), 10**12),
    (("groups", 1, "capacity"), 2**31),
    (("groups", 0, "layers"), [0]),
    (("groups", 1, "removed"), 1.0),
    (("groups", 1, "removed"), -5),
    (("groups", 0, "most"), 0.5),
    (("groups", 0, "chooses"), True),
    (("groups", 0, "source"), "nothing"),
    (("groups", 0, "kv_heads"), 3),
    (("graphs", "embed"), None),
    (("graphs", "decoder", "file"), "../decoder.onnx"),
    (("graphs", "decoder", "file"), "vision.onnx"),
    (("graphs", "decoder", "inputs", 0, "shape", 2), 7),
    (("graphs", "decoder", "outputs", 0, "name"), "other"),
    (("graphs", "vision", "outputs", 0, "dtype"), "float16"),
    (("graphs", "vision", "inputs", 0, "shape", 0), "Q"),
    (("dims", "W0"), [1, 3]),
    (("dims", "N"), [5, 3]),
    (("dims", "S"), [1]),
    (("eos_token_ids",), [99999]),
    (("image_grid",), [999, 999]),
    (("chains",), {"decoder": ["nothing"]}),
    (("guide",), "vision"),
    (("selection",), 4),
    (("macs", "token"), -1),
]


@pytest.mark.parametrize(("place", "value"), EDITS, ids=lambda v: str(v)[:50])
def test_contracts_that_python_refuses_are_refused(bundle, place, value):
    edited(bundle / "contract.json", place, value)
    seal(bundle)
    with pytest.raises(BundleError):
        open_bundle(bundle)
    with pytest.raises(ProbeError, match=r"contract\.json"):
        opened(bundle)


def _flip(bundle):
    data = bytearray((bundle / "decoder.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "decoder.onnx").write_bytes(data)


def _nested(bundle):
    (bundle / "contract.json").write_text('{"a":' + "[" * 70 + "]" * 70 + "}")
    seal(bundle)


def _not_json(bundle):
    (bundle / "contract.json").write_text('{"schema": NaN}')
    seal(bundle)


def _link(bundle):
    (bundle / "tokenizer.json").rename(bundle.parent / "tokenizer.json")
    os.symlink(bundle.parent / "tokenizer.json", bundle / "tokenizer.json")


def _outside(bundle):
    name = next(bundle.glob("*.safetensors")).name
    data = (bundle / "decoder.onnx").read_bytes()
    (bundle / "decoder.onnx").write_bytes(data.replace(name.encode(), ("x" * len(name)).encode()))
    seal(bundle)


BROKEN = {
    "flipped": (_flip, "is damaged or was edited"),
    "missing": (lambda bundle: (bundle / "vision.onnx").unlink(), "is missing"),
    "unlisted": (lambda bundle: (bundle / "extra.json").write_text("{}"), "is not listed in SHA256SUMS"),
    "no sums": (lambda bundle: (bundle / "SHA256SUMS").unlink(), "it has no SHA256SUMS"),
    "sums": (lambda bundle: (bundle / "SHA256SUMS").write_text("00  a\n"), "is damaged"),
    "parent": (lambda bundle: (bundle / "SHA256SUMS").write_text("0" * 64 + "  ../a\n"), "is damaged"),
    "nested": (_nested, "nests 71 deep"),
    "no JSON": (_not_json, "is no valid JSON"),
    "link": (_link, "is a link"),
    "outside": (_outside, "which is no file of the bundle"),
    "empty": (lambda bundle: shutil.rmtree(bundle), "no such folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_bundles_are_refused(bundle, name):
    spoil, said = BROKEN[name]
    spoil(bundle)
    with pytest.raises(BundleError):
        open_bundle(bundle)
    with pytest.raises(ProbeError, match=said):
        opened(bundle)


def test_cut_graphs_are_refused_as_in_python(bundle):
    """A graph is walked for the files that it names: every cut that is no protobuf is refused, and no other."""
    data = (bundle / "embed.onnx").read_bytes()
    for size in [1, 7, 60, len(data) // 2, len(data) - 1]:
        (bundle / "embed.onnx").write_bytes(data[:size])
        seal(bundle)
        try:
            external_files(data[:size])
        except ValueError:
            with pytest.raises(ProbeError, match="is no ONNX file"):
                opened(bundle)
        else:
            opened(bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["cache"].update(compacts=["compact-1"]), "graphs does not have what the cache policy runs"),
        (lambda c: c["cache"].update(count=3), "dims.R is not 0 to the 3 rows"),
        (lambda c: c["cache"].update(rows="some"), "expected one of last, text, probe"),
        (lambda c: c["cache"].update(share=2), "share is 2"),
        (lambda c: c.update(cache=None), "no cache policy reads them"),
        (lambda c: c["graphs"].pop("score"), "graphs does not have what the cache policy runs"),
        (lambda c: c["graphs"]["policy"]["outputs"][0]["shape"].__setitem__(2, "X"), "order of fixed sizes"),
        (lambda c: c["graphs"]["score"]["inputs"].pop(), "graphs.score is not what its cache policy needs"),
    ],
)
def test_a_cache_policy_that_does_not_agree_is_refused(change, said, export_tiny, tmp_path):
    folder = shutil.copytree(export_tiny("cut", cache=load_policy("snapkv")()), tmp_path / "bundle")
    contract = json.loads((folder / "contract.json").read_text())
    change(contract)
    (folder / "contract.json").write_text(json.dumps(contract))
    seal(folder)
    with pytest.raises(ProbeError, match=said):
        opened(folder)


def added(graphs):
    """Inputs of the decoder, and which of them DeepStack's features are."""
    inputs = graphs["decoder"]["inputs"]
    return inputs, next(index for index, tensor in enumerate(inputs) if tensor["name"] == "deepstack_features")


def widened(graphs):
    inputs, index = added(graphs)
    inputs[index]["shape"][2] += 1


def removed(graphs):
    inputs, index = added(graphs)
    del inputs[index]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (widened, "has among its inputs deepstack_features float32 .* where its groups need deepstack_features"),
        (removed, "the embedding does not turn token ids and image features into inputs_embeds"),
        (lambda graphs: graphs["embed"]["outputs"].pop(), r"into inputs_embeds .* and deepstack_features float32 "),
        (lambda graphs: graphs["vision"]["outputs"][0]["shape"].__setitem__(1, 256), "takes features of width 768"),
    ],
)
def test_features_of_layers_that_do_not_agree_are_refused(change, said, export_tiny, tmp_path):
    folder = shutil.copytree(export_tiny("cpp-qwen3", family="qwen3_vl", k=1, r=0.5), tmp_path / "bundle")
    contract = json.loads((folder / "contract.json").read_text())
    change(contract["graphs"])
    (folder / "contract.json").write_text(json.dumps(contract))
    seal(folder)
    with pytest.raises(ProbeError, match=said):
        opened(folder)


def test_what_only_the_python_runtime_provides_is_refused(export_tiny):
    windows = {"family": "gemma3", "max_seq_len": 512, "max_input_len": 56}
    with pytest.raises(
        ProbeError, match=r"groups\[0\]\.window: caches that hold a window alone are the Python runtime's"
    ):
        opened(export_tiny("windows", **windows))
