"""staging.py: a bundle is written whole or not at all, and nothing is replaced or removed but a bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vlmtrim.graphs import staging as module
from vlmtrim.graphs.bundle import seal
from vlmtrim.graphs.staging import TargetError, check_target, scratch, staging

SUMS = "SHA256SUMS"


def fill(folder: Path, mark: str = "old") -> Path:
    """A bundle as far as replacing goes; ``mark`` tells one from another."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "contract.json").write_text(json.dumps({"producer": "vlmtrim 0.1.0", "mark": mark}))
    (folder / "job.json").write_text(json.dumps({"versions": {"vlmtrim": "0.1.0"}}))
    (folder / "decoder.onnx").write_bytes(b"graph")
    seal(folder)
    return folder


def mark(folder: Path) -> str:
    return json.loads((folder / "contract.json").read_text())["mark"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def check_refused(target: Path, *words: str, force: bool = True) -> None:
    """No block is entered and nothing beside the target changes."""
    before = sorted(os.listdir(target.parent)) if target.parent.is_dir() else None
    with pytest.raises(TargetError) as caught, staging(target, force):
        raise AssertionError("must not start")
    for word in words:
        assert word in str(caught.value)
    assert "--output" in str(caught.value)
    if before is not None:
        assert sorted(os.listdir(target.parent)) == before


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill(tmp_path / "bundle")


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Both ways to replace a folder: what the kernel does in one step, and what is left without it."""
    if request.param == "two renames":
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: object())
    return request.param


def test_the_finished_folder_is_put_in_place_and_nothing_stays_beside_it(swap, tmp_path):
    target = tmp_path / "deep" / "er" / "bundle"
    with staging(target, force=False) as partial:
        assert not target.exists() and partial.parent == target.parent
        fill(partial)
    assert mark(target) == "old"
    assert os.listdir(target.parent) == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_not_even_the_folders_above(tmp_path, error):
    with pytest.raises(error), staging(tmp_path / "deep" / "bundle", force=False) as partial:
        fill(partial)
        raise error
    assert os.listdir(tmp_path) == []


def test_an_exception_while_replacing_leaves_the_old_bundle(folder):
    before = tree(folder)
    with pytest.raises(RuntimeError), staging(folder, force=True) as partial:
        (partial / "contract.json").write_text("half")
        raise RuntimeError
    assert tree(folder) == before
    assert os.listdir(folder.parent) == ["bundle"]


def test_an_existing_target_is_refused_without_force(folder):
    before = tree(folder)
    check_refused(folder, str(folder), "exists", "--force", force=False)
    assert tree(folder) == before


def test_force_replaces_a_bundle_whole(swap, folder):
    (folder / "weights.safetensors").write_text("old")
    seal(folder)
    with staging(folder, force=True) as partial:
        assert mark(folder) == "old"
        fill(partial, "new")
    assert mark(folder) == "new"
    assert sorted(os.listdir(folder)) == [SUMS, "contract.json", "decoder.onnx", "job.json"]
    assert os.listdir(folder.parent) == ["bundle"]


@pytest.mark.parametrize("damage", ["truncated", "edited"])
def test_force_replaces_a_damaged_bundle(folder, damage):
    (folder / "decoder.onnx").write_bytes(b"" if damage == "truncated" else b"other")
    with staging(folder, force=True) as partial:
        fill(partial, "new")
    assert mark(folder) == "new"


def test_force_replaces_an_empty_folder(swap, tmp_path):
    (tmp_path / "bundle").mkdir()
    with staging(tmp_path / "bundle", force=True) as partial:
        fill(partial)
    assert mark(tmp_path / "bundle") == "old"


# Finding 2: what is called a bundle.


@pytest.mark.parametrize("sums", [None, "abc  x\n", "0" * 64 + "  thesis.txt\n", "\xff"])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path, sums):
    home = tmp_path / "home"
    (home / "docs").mkdir(parents=True)
    (home / "docs" / "thesis.txt").write_text("precious")
    (home / "thesis.txt").write_text("precious")
    if sums is not None:
        (home / SUMS).write_text(sums, encoding="latin-1")
    before = tree(home)
    check_refused(home, str(home), "is no bundle")
    assert tree(home) == before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("contract.json", "{}"),
        ("contract.json", "[]"),
        ("contract.json", '{"producer": "somebody else"}'),
        ("job.json", "{}"),
        ("job.json", '{"versions": {"other": "1"}}'),
        ("job.json", "no json"),
    ],
)
def test_a_folder_of_another_producer_is_not_replaced(folder, file, text):
    (folder / file).write_text(text)
    seal(folder)
    check_refused(folder, "is no bundle", file)
    assert (folder / file).read_text() == text


@pytest.mark.parametrize("missing", ["contract.json", "job.json", SUMS])
def test_a_folder_without_a_file_that_every_bundle_has_is_not_replaced(folder, missing):
    (folder / missing).unlink()
    check_refused(folder, "is no bundle", missing)


def test_what_lies_in_a_bundle_besides_its_files_is_named(folder):
    (folder / "notes.txt").write_text("precious")
    check_refused(folder, "holds notes.txt besides the bundle's own files")
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
    check_refused(folder, "holds a, b, c and 1 more besides the bundle's own files")
    assert (folder / "notes.txt").read_text() == "precious"


def test_a_listed_file_that_is_a_link_is_named(folder, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx").symlink_to(tmp_path / "precious")
    check_refused(folder, "holds decoder.onnx besides")


def test_what_came_into_a_bundle_while_it_was_replaced_stays(swap, folder):
    """The last look is before the rename; what it did not see is not deleted either."""
    real = module._rename

    def late(source, target, flag):
        if not (folder / "late.txt").exists():
            (folder / "late.txt").write_text("precious")
        real(source, target, flag)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_no_bundle", lambda folder: None)
        patch.setattr(module, "_rename", late)
        with staging(folder, force=True) as partial:
            fill(partial, "new")
    assert mark(folder) == "new"
    (kept,) = folder.parent.glob(".bundle.old.partial-*")
    assert tree(kept) == {"late.txt": b"precious"}


# Finding 11 and its like: places where no folder can be written.


def test_a_file_at_the_target_is_never_replaced(tmp_path):
    (tmp_path / "bundle").write_text("precious")
    check_refused(tmp_path / "bundle", "is no folder")
    check_refused(tmp_path / "bundle", "exists", force=False)
    assert (tmp_path / "bundle").read_text() == "precious"


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("to", ["bundle", "nowhere"])
def test_a_symbolic_link_is_refused_dangling_or_not(folder, force, to):
    link = folder.parent / "link"
    link.symlink_to(to)
    check_refused(link, str(link), "symbolic link", force=force)
    assert link.is_symlink() and mark(folder) == "old"


def test_a_place_under_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_refused(tmp_path / "link" / "bundle", "symbolic link to nothing")
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_the_folder_above_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staging(tmp_path / "link" / "bundle", force=False) as partial:
        fill(partial)
    assert mark(tmp_path / "real" / "bundle") == "old"


def test_a_place_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    check_refused(tmp_path / "file" / "bundle", f"under {tmp_path / 'file'}", "no folder")
    check_refused(tmp_path / "file" / "deep" / "bundle", "no folder")


@pytest.mark.parametrize("inner", ["inner", "deep/inner"])
def test_a_place_inside_a_bundle_is_refused(folder, inner):
    before = tree(folder)
    check_refused(folder / inner, f"inside the bundle {folder}")
    assert tree(folder) == before


def test_a_folder_that_cannot_be_written_is_refused():
    check_refused(Path("/proc/bundle"), "/proc cannot be written")
    check_refused(Path("/proc/deep/bundle"), "/proc cannot be written")


def test_a_name_too_long_for_a_file_system_is_refused(tmp_path):
    check_refused(tmp_path / ("a" * 201), "more than 200 bytes")


@pytest.mark.parametrize("place", ["/", ".", "..", "x/.."])
def test_the_root_and_the_folders_around_are_refused(tmp_path, monkeypatch, place):
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for force in (True, False):
        with pytest.raises(TargetError):
            check_target(place, force)


# Finding 13: two exports to one target.

WRITER = """
import json, sys
from pathlib import Path
from vlmtrim.graphs.bundle import seal
from vlmtrim.graphs.staging import staging
with staging(Path(sys.argv[1]), force=sys.argv[2] == "force") as partial:
    (partial / "contract.json").write_text(json.dumps({"producer": "vlmtrim 0", "mark": "first"}))
    (partial / "job.json").write_text(json.dumps({"versions": {"vlmtrim": "0"}}))
    seal(partial)
    print("writing", flush=True)
    sys.stdin.readline()
"""


def writer(target: Path, force: bool = False) -> subprocess.Popen:
    """Another process that holds the target until it reads a line."""
    command = [sys.executable, "-c", WRITER, str(target), "force" if force else ""]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("force", [True, False])
def test_of_two_exports_to_one_target_the_first_wins(tmp_path, force):
    target = tmp_path / "bundle"
    with writer(target, force) as first:
        check_refused(target, "another export is writing to it", force=force)
        first.communicate("\n")
    assert first.returncode == 0 and mark(target) == "first"
    assert os.listdir(tmp_path) == ["bundle"]


def test_many_exports_at_once_have_one_winner(tmp_path):
    won, start = [], threading.Barrier(8)

    def export(number: int) -> None:
        start.wait()
        try:
            with staging(tmp_path / "bundle", force=False) as partial:
                fill(partial, str(number))
                won.append(str(number))
        except TargetError:
            pass

    # Threads share a process id, so they share the name of the temporary folder: the lock alone keeps them apart.
    threads = [threading.Thread(target=export, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mark(tmp_path / "bundle")] == won
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(("force", "there"), [(False, {}), (False, {"a": b"x"}), (True, {"a": b"x"})])
def test_what_took_the_place_meanwhile_is_not_replaced(swap, tmp_path, force, there):
    target = tmp_path / "bundle"
    with pytest.raises(TargetError), staging(target, force) as partial:
        fill(partial)
        target.mkdir()
        for name, data in there.items():
            (target / name).write_bytes(data)
    assert tree(target) == there
    assert os.listdir(tmp_path) == ["bundle"]


# Findings 12 and 21: kills.


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_export_leaves_no_half_bundle_and_the_next_one_cleans_up(tmp_path, replacing):
    target = tmp_path / "bundle"
    if replacing:
        fill(target)
    before = tree(target)
    with writer(target, force=True) as process:
        process.send_signal(signal.SIGKILL)
    assert target.exists() == replacing and tree(target) == before
    assert list(tmp_path.glob(".bundle.partial-*"))
    with staging(target, force=True) as partial:
        fill(partial, "new")
    assert mark(target) == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_only_copy_that_a_kill_left_under_another_name_is_brought_back(tmp_path):
    """Killed between two renames: the next export finds it, and it stays if that export fails."""
    fill(tmp_path / f".bundle.old.partial-{dead_pid()}")
    fill(tmp_path / f".bundle.partial-{dead_pid()}", "half")
    check_refused_now = pytest.raises(TargetError, match="exists")
    with check_refused_now, staging(tmp_path / "bundle", force=False):
        raise AssertionError("must not start")
    assert mark(tmp_path / "bundle") == "old"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("fails", [True, False])
def test_an_old_copy_stays_until_a_new_bundle_stands(tmp_path, fails):
    retired = fill(tmp_path / f".bundle.old.partial-{dead_pid()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_recover", lambda target: None)
        try:
            with staging(tmp_path / "bundle", force=True) as partial:
                fill(partial, "new")
                assert mark(retired) == "old"
                if fails:
                    raise RuntimeError
        except RuntimeError:
            assert fails
    assert os.listdir(tmp_path) == ([retired.name] if fails else ["bundle"])


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from vlmtrim.graphs import staging as module
module.ctypes.CDLL = lambda *_, **__: object()
real, renames = Path.rename, []
def rename(self, target):
    renames.append(self)
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.rename = rename
with module.staging(Path(sys.argv[1]), force=True) as partial:
    (partial / "contract.json").write_text("new")
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_two_renames_loses_nothing(folder, number):
    done = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(folder), str(number)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert folder.exists() == (number == 1)
    with pytest.raises(RuntimeError), staging(folder, force=True):
        assert mark(folder) == "old"
        raise RuntimeError
    assert mark(folder) == "old"
    assert os.listdir(folder.parent) == ["bundle"]


def test_the_lock_of_a_killed_export_holds_nobody_up(tmp_path):
    with writer(tmp_path / "bundle") as process:
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".bundle.lock").exists()
    with staging(tmp_path / "bundle", force=False) as partial:
        fill(partial)
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("name", [f".elsewhere.partial-{os.getppid()}", ".bundle2.partial-1", ".bundle.partial-x"])
def test_other_folders_with_like_names_stay(tmp_path, name):
    fill(tmp_path / name)
    with staging(tmp_path / "bundle", force=False) as partial:
        fill(partial)
    assert (tmp_path / name / "decoder.onnx").exists()


def test_scratch_of_the_dead_is_removed_and_of_the_living_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    dead, living = tmp_path / f"vlmtrim-{dead_pid()}-abcd", tmp_path / f"vlmtrim-{os.getppid()}-abcd"
    elsewhere = tmp_path / f"vlmtrim-{dead_pid()}-held"  # of a process that this one does not see
    others = [tmp_path / "vlmtrim-notes", tmp_path / f"other-{dead_pid()}-abcd", tmp_path / "link"]
    for path in (dead, living, elsewhere, *others):
        fill(path)
    (tmp_path / f"vlmtrim-{dead_pid()}-link").symlink_to(others[2])
    held = os.open(elsewhere, os.O_RDONLY)
    module.fcntl.flock(held, module.fcntl.LOCK_EX)
    with scratch() as mine:
        assert mine.parent == tmp_path and not dead.exists()
        assert all((path / "decoder.onnx").exists() for path in (living, elsewhere, *others))
    os.close(held)
    assert not mine.exists()
