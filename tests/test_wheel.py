"""The wheel holds everything, and what it installs runs bundles without torch or transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("export", "graphs", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".toml", ".md", "") and not path.name.startswith("."):
            shutil.copy(path, copy)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", str(out), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("vlmtrim-*.whl")
    return made


def test_the_wheel_is_small(wheel, capsys):
    """The demos' weights are most of it; its size is printed with the test run."""
    size = wheel.stat().st_size
    with capsys.disabled():
        print(f"\n{wheel.name}: {size / 1e6:.1f} MB")
    assert size < 13e6


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_python_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"vlmtrim/{p.relative_to(ROOT).as_posix()}" for f in FOLDERS for p in (ROOT / f).rglob("*.py")}
    assert expected - names == set()


def test_the_wheel_holds_the_demo_checkpoints(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for demo in (ROOT / "export" / "demo" / "checkpoint", ROOT / "export" / "demo" / "small"):
        files = {f"vlmtrim/{p.relative_to(ROOT).as_posix()}" for p in demo.rglob("*") if p.is_file()}
        assert files and files - names == set()


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlmtrim"}


# The editable install brings a meta-path finder and .pth files: both are taken away before the first import.
PRELUDE = """
import importlib, importlib.abc, pkgutil, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv[1])

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""
IMPORT_ALL = """
for package in ("vlmtrim.graphs", "vlmtrim.runtime"):
    module = importlib.import_module(package)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
    for found in pkgutil.walk_packages(module.__path__, package + "."):
        loaded = importlib.import_module(found.name)
        assert loaded.__file__.startswith(sys.argv[1]), loaded.__file__
        print(found.name)
assert not {"torch", "transformers"} & set(sys.modules)
"""
HELP = """
import vlmtrim.runtime.cli
assert vlmtrim.runtime.cli.__file__.startswith(sys.argv[1])
vlmtrim.runtime.cli.main(["--help"])
"""


def python(code: str, installed: Path, cwd: Path) -> str:
    command = [sys.executable, "-I", "-c", PRELUDE + code, str(installed)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runtime_and_graphs_import_from_the_wheel_without_torch_and_transformers(installed, tmp_path):
    imported = set(python(IMPORT_ALL, installed, tmp_path).split())
    for folder in ("graphs", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert "vlmtrim." + ".".join(path.relative_to(ROOT).with_suffix("").parts) in imported


def test_run_vlm_help_works_from_the_wheel_without_torch_and_transformers(installed, tmp_path):
    assert "usage: run-vlm" in python(HELP, installed, tmp_path)
