"""A family is one file: without it the others stand, and nothing names it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmtrim.export.checkpoint import family_names

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from vlmtrim.export.cli import main; sys.exit(main(sys.argv[1:]))"


def without(folder, *families):
    """A copy of the package that lacks some families, their processors and references."""
    skipped = [f"{prefix}{name}.py" for name in families for prefix in ("", "reference_")]
    for part in ("export", "graphs", "runtime"):
        ignored = shutil.ignore_patterns("*.safetensors", "cpp", "__pycache__", *skipped)
        shutil.copytree(ROOT / part, folder / "vlmtrim" / part, ignore=ignored)
    return folder


def run(folder, *argv):
    command = [sys.executable, "-c", RUN, *argv]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.mark.parametrize("family", family_names())
def test_a_family_that_is_deleted_is_not_listed_and_the_others_are(family, tmp_path):
    done = run(without(tmp_path, family), "--list")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.split("families")[1].splitlines()[1:]]
    assert rows == [name for name in family_names() if name != family]
    refused = run(tmp_path, "--model", f"tiny:{family}", "--dry-run")
    assert refused.returncode == 2 and "is not supported" in refused.stderr


@pytest.mark.parametrize("kept", ["llava", "qwen2_vl"])
def test_a_family_is_planned_without_any_other(kept, tmp_path):
    others = [name for name in family_names() if name != kept]
    done = run(without(tmp_path, *others), "--model", f"tiny:{kept}", "--dry-run", "--max-seq-len", "512")
    assert done.returncode == 0 and "decoder.onnx: inputs" in done.stdout, done.stderr


def test_no_code_names_a_family_by_its_module():
    """Only a family's own file, its processor and its reference do; processors may build on one another."""
    named = []
    for path in sorted((ROOT / "export").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("vlmtrim.export.families"):
                named.append(f"{path.relative_to(ROOT)} imports {module}")
    assert [line for line in named if not line.startswith("export/demo/")] == []
