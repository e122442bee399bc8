"""The C++ sources as clang-format has them, and, where there is time, without a finding of clang-tidy.

Both come as Python packages, so that all machines judge alike: clang-format in the extra ``test``, clang-tidy (150 MB)
by hand.
"""

import subprocess

import pytest
from probing import ROOT, build_folder

SOURCES = [
    path
    for folder in ("runtime/cpp", "tests/cpp")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".cpp", ".hpp", ".h")
]


def test_sources_are_formatted():
    clang_format = pytest.importorskip("clang_format")
    command = [clang_format.get_executable("clang-format"), "--dry-run", "-Werror", *SOURCES]
    found = subprocess.run(command, capture_output=True, text=True)
    assert len(SOURCES) > 90
    assert found.returncode == 0, found.stderr[-2000:]


@pytest.mark.slow
def test_clang_tidy_finds_nothing():
    """Some ten seconds a file; what it looks for is in runtime/cpp/.clang-tidy."""
    clang_tidy = pytest.importorskip("clang_tidy")
    command = [clang_tidy.get_executable("clang-tidy"), "-p", build_folder(), "--quiet"]
    ours = [path for path in SOURCES if path.suffix == ".cpp" and "runtime/cpp/src" in str(path)]
    found = subprocess.run([*command, *ours], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:]
