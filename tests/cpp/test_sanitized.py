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


@pytest.mark.slow
def test_no_mistake_is_found():
    environment = {**os.environ, **ENVIRONMENT}
    built = subprocess.run([ROOT / "scripts/cpp.sh", "-DVLMTRIM_SANITIZE=ON"], env=environment, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    places = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    environment["LD_PRELOAD"] = " ".join(places)
    files = ["bundle", "pictures", "tokenizer", "prompt", "session", "c_interface", "damage"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/cpp/test_{name}.py" for name in files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
