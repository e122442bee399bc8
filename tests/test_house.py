"""Architecture: who may import whom, what is packaged, how long files and functions are, what lies at the top."""

from __future__ import annotations

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("export", "graphs", "runtime")
DOCUMENTS = ("README.md", "BENCHMARKS.md", "SECURITY.md", "CHANGELOG.md")
TOP = {*FOLDERS, "tests", "scripts", "pyproject.toml", "LICENSE", *DOCUMENTS}
CONTRACT = ("contract", "boundary", "bundle", "checksums", "reading", "schema", "agreement", "external", "keeping")
CONTRACT += ("macs", "packed")
NATIVE = sorted(path for folder in ("runtime/cpp", "tests/cpp") for path in (ROOT / folder).rglob("*.[ch]*pp"))
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full dotted names that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    package = ["vlmtrim", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def offences(folder: str, *banned: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imports(path))
        if any(within(name, module) for module in banned)
    ]


def test_there_is_something_to_check():
    assert all(any(path.is_relative_to(ROOT / folder) for path in FILES) for folder in FOLDERS)
    assert len(NATIVE) > 10


def test_runtime_imports_neither_torch_nor_transformers_nor_export():
    assert offences("runtime", "torch", "transformers", "vlmtrim.export", "export") == []


def test_runtime_takes_only_contract_and_bundle_from_graphs():
    allowed = ("vlmtrim.graphs.contract", "vlmtrim.graphs.bundle", "vlmtrim.graphs.checksums", "vlmtrim.graphs.reading")
    allowed += ("vlmtrim.graphs.schema", "vlmtrim.graphs.keeping")
    taken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        for name in sorted(imports(path))
        if within(name, "vlmtrim.graphs") and not any(within(name, module) for module in allowed)
    ]
    assert taken == []


def test_graphs_imports_neither_torch_nor_onnxruntime_nor_the_other_folders():
    banned = ("torch", "transformers", "onnxruntime", "vlmtrim.export", "vlmtrim.runtime", "export", "runtime")
    assert offences("graphs", *banned) == []


def test_contract_and_bundle_need_the_standard_library_only():
    import sys

    own = tuple(f"vlmtrim.graphs.{name}" for name in CONTRACT)
    for module in (*own, "vlmtrim.graphs.staging"):
        name = module.rpartition(".")[2] + ".py"
        foreign = {n for n in imports(ROOT / "graphs" / name) if n.partition(".")[0] not in sys.stdlib_module_names}
        assert {n for n in foreign if not any(within(n, module) for module in own)} == set()


def test_no_folder_is_imported_bare():
    assert [o for folder in FOLDERS for o in offences(folder, *FOLDERS)] == []


def test_every_folder_with_python_files_is_packaged():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"vlmtrim." + ".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert found - set(setup["packages"]) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_files_stay_short(path):
    lines = path.read_text().splitlines()
    assert 0 < len(lines) <= 400 and max(map(len, lines)) <= 120


def test_the_top_level_holds_what_the_design_says():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git here")
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP
