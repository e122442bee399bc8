"""Bundles with a cache policy in C++, against the Python runtime on the same library: to the bit, round by round."""

import json
import subprocess

import numpy as np
import pytest
from probing import Native, ProbeError, build_folder
from test_session import compare, decode, ids_of

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.caches import load_policy, policy_names
from vlmtrim.runtime import cli
from vlmtrim.runtime.backends.ort import OrtBackend
from vlmtrim.runtime.engines import profiles
from vlmtrim.runtime.image import generated_picture
from vlmtrim.runtime.session import Session

# Policies on other methods than the plain decoder: groups of their own, layers that choose.
METHODS = {"aircache": "fastv", "snapkv": "zipvl"}


FIELDS = {
    "snapkv": {"pool": 3},
    "elastic": {"merge": True, "evict": 5},
    "scope": {"window": 4, "recent": 2, "every": 3},
    "keyformer": {"every": 3, "rise": 0.1},
    "prefixkv": {"table": tuple(tuple(min(1.0, s / 10 * f) for f in (0.4, 1.6, 1.2, 0.8)) for s in range(11))},
}


def exported(export_tiny, name, family="llava", method=None):
    share = 0.97 if name == "zipvl-drop" else 0.4  # of the attention there
    policy = load_policy(name)(**FIELDS.get(name, {}))
    method = method or METHODS.get(name, "none")
    return export_tiny("cpp-cut", family=family, method=method, cache=policy, cache_share=share)


def two_turns(bundle, native, buckets=False, every=0):
    backend = OrtBackend("ort-cpu")
    if buckets:
        backend.window = profiles.bucket
    with Session(bundle, backend) as ours:
        if every:
            ours.caching.every = every
            native.cut(every=every)
        for turn, sizes in enumerate([[(240, 200)], [], [(70, 90)]]):
            if turn == 2:
                ours.caching.share = 0.15
                native.cut(share=0.15)
            images = [generated_picture(turn).resize(size) for size in sizes]
            pictures = ours.processor(images) if images else None
            ids = ids_of(ours.contract, pictures.tokens if pictures else [], 12, turn)
            token = compare(ours, native, ids, pictures)
            decode(ours, native, token, 9)
        ours.reset()
        native.reset()
        compare(ours, native, ids_of(ours.contract, [], 9, 5), None)


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_to_the_bit(policy, export_tiny):
    bundle = open_bundle(exported(export_tiny, policy))
    native = Native(bundle.folder)
    two_turns(bundle, native, every=2 if bundle.contract.cache.every else 0)
    native.close()


@pytest.mark.parametrize(
    "policy", [name if name == "elastic" else pytest.param(name, marks=pytest.mark.slow) for name in policy_names()]
)
def test_policies_of_layers_with_windows_to_the_bit(policy, export_tiny):
    method = "fastv" if policy == "aircache" else "none"
    bundle = open_bundle(exported(export_tiny, policy, "gemma3", method))
    native = Native(bundle.folder)
    two_turns(bundle, native, every=2 if bundle.contract.cache.every else 0)
    native.close()


@pytest.mark.parametrize("policy", ["aircache", "snapkv", "elastic", "keyformer"])
def test_policies_on_engines_to_the_bit(policy, export_tiny, place, tmp_path):
    bundle = exported(export_tiny, policy)
    here = place()
    native = Native(here.with_engines(bundle, tmp_path / "bundle"), backend="tensorrt")
    two_turns(open_bundle(bundle), native, buckets=True)
    native.close()
    assert here.count("replays") > 20


def test_what_a_policy_does_not_take_is_refused(export_tiny, fastv_bundle):
    native = Native(exported(export_tiny, "snapkv"))
    with pytest.raises(ProbeError, match=r"the share of the caches is 1.5; give 0 to 1"):
        native.cut(share=1.5)
    with pytest.raises(ProbeError, match="are not cut while an answer grows"):
        native.cut(every=4)
    native.close()
    native = Native(exported(export_tiny, "scope"))
    with pytest.raises(ProbeError, match="decode steps between two rounds are -1; give 1 or more"):
        native.cut(every=-1)
    native.close()
    native = Native(fastv_bundle)
    with pytest.raises(ProbeError, match="the bundle has no cache policy"):
        native.cut(share=0.5)
    native.close()


@pytest.mark.parametrize(("policy", "more"), [("snapkv", ["--cache-share", "0.25"]), ("scope", ["--cache-every", "2"])])
def test_the_record_is_run_vlms(policy, more, export_tiny, picture, capsys):
    folder = str(exported(export_tiny, policy))
    asked = ["--image", str(picture), "--prompt", "What is it?", "--max-new-tokens", "6", "--json", *more]
    assert cli.main([folder, *asked, "--backend", "ort-cpu"]) == 0
    expected = json.loads(capsys.readouterr().out)
    done = subprocess.run([build_folder() / "vlmtrim-run", folder, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["caches"] == expected["caches"] and list(found["caches"]) == list(expected["caches"])
    assert found["token_ids"] == expected["token_ids"] and np.isfinite(found["times"]["caches"])
    refused = subprocess.run(
        [build_folder() / "vlmtrim-run", folder, *asked, "--cache-share", "7"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "give 0 to 1" in refused.stderr
