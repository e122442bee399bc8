"""The tests of the C++ runtime once more, with addresses and undefined behaviour checked."""

import os
import subprocess
import sys
from functools import cache

import pytest
from probing import ROOT

from vlmtrim.graphs.caches import load_policy

BUILD = "build/cpp-sanitized"
# Python and the libraries that it loads leak by design; a mistake ends the process.
ENVIRONMENT = {
    "VLMTRIM_CPP_BUILD": BUILD,
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


CASES = {
    "fastv": ("llava", {"k": 2, "r": 0.5}),
    "zipvl": ("llava", {"method": "zipvl"}),
    "next": ("llava_next", {"k": 2, "r": 0.5}),
    "qwen2_5": ("qwen2_5_vl", {"k": 1, "r": 0.5}),
    "smol": ("smolvlm", {"k": 2, "r": 0.5}),
    "idefics": ("idefics3", {"k": 2, "r": 0.5}),
    "intern": ("internvl", {"k": 2, "r": 0.5}),
    "gemma": ("gemma3", {"k": 2, "r": 0.5}),
    "trimmed": ("mllama", {"method": "trimmed-llama", "ratio": 0.25, "images": 3}),
    "snapkv": ("llava", {"method": "zipvl", "cache": load_policy("snapkv")(pool=3), "cache_share": 0.4}),
    "elastic": ("llava", {"method": "none", "cache": load_policy("elastic")(merge=True, evict=5), "cache_share": 0.4}),
    "keyformer": ("llava", {"method": "none", "cache": load_policy("keyformer")(every=3), "cache_share": 0.4}),
}


@cache
def build():
    environment = {**os.environ, **ENVIRONMENT}
    built = subprocess.run([ROOT / "scripts/cpp.sh", "-DVLMTRIM_SANITIZE=ON"], env=environment, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()


def environment_of(**more):
    """Of a process that is checked, once it is built."""
    build()
    return {**os.environ, **ENVIRONMENT, **more}


def library(name):
    """Path of one of the compiler's own."""
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def asked(folder, picture):
    tool = ROOT / BUILD / "vlmtrim-run"
    return [tool, folder, "--image", picture, "--prompt", "What </s>?", "--temperature", "2", "--top-p", "0.9"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_mistake_is_found_in_an_answer(name, export_tiny, picture):
    """With the tool: Python's exporter would take hours under the sanitizer."""
    family, fields = CASES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    environment = environment_of(ASAN_OPTIONS="detect_leaks=1")
    command = asked(folder, picture)
    for more in (["--seed", "1", "--stop", "xyz"], ["--image", "/nowhere.png"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == (2 if "--image" in more else 0) and "Sanitizer" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastv", "trimmed", "snapkv", "keyformer"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "ort-cuda"])
def test_no_mistake_is_found_on_stand_ins(backend, name, export_tiny, picture, place, tmp_path):
    """Of TensorRT, CUDA and ONNX Runtime's CUDA provider; they are sanitized as well."""
    family, fields = CASES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    environment = environment_of(ASAN_OPTIONS="detect_leaks=1")
    if backend == "ort-cuda":
        environment["VLMTRIM_ONNXRUNTIME"] = str(ROOT / BUILD / "stand_in_onnxruntime/libstand_in_onnxruntime.so")
    else:
        folder = place(backend).with_engines(folder, tmp_path / "bundle")
        environment["LD_PRELOAD"] = f"{library('libasan.so')} {ROOT / BUILD / 'stand_in/libvlmtrim.so.0'}"
    command = [*asked(folder, picture), "--seed", "1", "--backend", backend, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Sanitizer" not in done.stderr, done.stderr
    assert f'"backend":"{backend}"' in done.stdout


@pytest.mark.slow
def test_no_mistake_is_found():
    preloaded = map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    environment = environment_of(LD_PRELOAD=" ".join(preloaded))
    files = ["bundle", "pictures", "tokenizer", "prompt", "damage"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/cpp/test_{name}.py" for name in files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
