"""The tests of the C++ runtime once more, with addresses and undefined behaviour checked."""

import os
import subprocess
import sys

import pytest
from probing import ROOT

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
    "trimmed": ("mllama", {"method": "trimmed-llama", "ratio": 0.25, "images": 3}),
}


def build():
    environment = {**os.environ, **ENVIRONMENT}
    built = subprocess.run([ROOT / "scripts/cpp.sh", "-DVLMTRIM_SANITIZE=ON"], env=environment, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_mistake_is_found_in_an_answer(name, export_tiny, picture):
    """With the tool: Python's exporter would take hours under the sanitizer."""
    family, fields = CASES[name]
    folder = export_tiny(f"cpp-{name}", family=family, **fields)
    tool = ROOT / BUILD / "vlmtrim-run"
    command = [tool, folder, "--image", picture, "--prompt", "What </s>?", "--temperature", "2", "--top-p", "0.9"]
    environment = {**build(), "ASAN_OPTIONS": "detect_leaks=1"}
    for more in (["--seed", "1", "--stop", "xyz"], ["--image", "/nowhere.png"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == (2 if "--image" in more else 0) and "Sanitizer" not in done.stderr, done.stderr


@pytest.mark.slow
def test_no_mistake_is_found():
    environment = build()
    places = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment["LD_PRELOAD"] = " ".join(places)
    files = ["bundle", "pictures", "tokenizer", "prompt", "damage"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/cpp/test_{name}.py" for name in files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
