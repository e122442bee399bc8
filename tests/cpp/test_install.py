"""What is installed is enough for a project of somebody else: by CMake, by pkg-config, in C."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from probing import ROOT, build_folder

EXAMPLES = ROOT / "export/demo/examples"
CONSUMER = ROOT / "runtime/cpp/examples/consumer"


def command(*words, **settings):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """An install tree that was moved since: nothing in it says where it was."""
    folder = tmp_path_factory.mktemp("installed")
    command("cmake", "--install", build_folder(), "--prefix", folder / "first")
    return shutil.move(folder / "first", folder / "moved")


def test_a_project_finds_it_builds_and_answers(prefix, demo_bundle, tmp_path):
    command("cmake", "-S", CONSUMER, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    command("cmake", "--build", tmp_path)
    question = (demo_bundle, EXAMPLES / "word.png", "Which word is written?")
    answer = command(tmp_path / "ask", *question)
    tool = command(prefix / "bin/vlmtrim-run", question[0], "--image", question[1], "--prompt", question[2])
    assert answer == tool and len(answer) > 1


def test_another_minor_version_is_not_taken(prefix, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(CONSUMER, project)
    lists = (project / "CMakeLists.txt").read_text()
    (project / "CMakeLists.txt").write_text(lists.replace("vlmtrim 0.1", "vlmtrim 0.2"))
    done = subprocess.run(
        ["cmake", "-S", project, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"], capture_output=True
    )
    assert done.returncode != 0 and b"version" in done.stderr


def test_the_header_is_c(prefix, tmp_path):
    source = tmp_path / "main.c"
    source.write_text(
        "#include <vlmtrim.h>\n#include <stdio.h>\nint main(void) { return puts(vlmtrim_version()) < 0; }\n"
    )
    pc = next(Path(prefix).rglob("vlmtrim.pc"))
    values = dict(line.split("=", 1) for line in pc.read_text().splitlines() if "=" in line)
    flags = " ".join(line.partition(":")[2] for line in pc.read_text().splitlines() if line[:5] in ("Libs:", "Cflag"))
    for name, value in values.items():
        flags = flags.replace(f"${{{name}}}", value).replace("${pcfiledir}", str(pc.parent))
    command(
        "gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", source, "-o", tmp_path / "main", *flags.split()
    )
    library = next(Path(prefix).rglob("libvlmtrim.so")).parent
    assert command(tmp_path / "main", env={**os.environ, "LD_LIBRARY_PATH": str(library)}) == "0.1.0\n"


def test_the_library_shows_its_interface_alone():
    symbols = command("nm", "-D", "--defined-only", build_folder() / "libvlmtrim.so").split("\n")
    shown = [line.split()[-1].partition("@")[0] for line in symbols if line]
    assert len(shown) >= 11 and all(name.startswith(("vlmtrim_", "VLMTRIM_")) for name in shown)
