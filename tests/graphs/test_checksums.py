"""Digests of large files are remembered, and never wrong when a file has changed."""

import hashlib
import os
import time

import pytest

from vlmtrim.graphs import checksums


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large and changed a while ago; `hashed` lists what was really read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "LARGE", 4)
    hashed, real = [], checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path, *_: hashed.append(path) or real(path))
    path = tmp_path / "weights"
    write(path, b"first content")
    return path, hashed


def write(path, content, age=100.0):
    path.write_bytes(content)
    then = time.time() - age
    os.utime(path, (then, then))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(large):
    path, hashed = large
    assert [checksums.known_sha256(path) for _ in range(3)] == [digest(path)] * 3
    assert len(hashed) == 1


@pytest.mark.parametrize("content", [b"other content", b"longer content than first"])
def test_a_changed_file_is_read_again(large, content):
    path, hashed = large
    checksums.known_sha256(path)
    write(path, content, age=50.0)
    assert checksums.known_sha256(path) == digest(path)
    assert len(hashed) == 2


def test_a_hard_link_and_a_renamed_file_are_the_same_file(large, tmp_path):
    path, hashed = large
    checksums.known_sha256(path)
    os.link(path, tmp_path / "link")
    path.rename(tmp_path / "moved")
    assert checksums.known_sha256(tmp_path / "link") == checksums.known_sha256(tmp_path / "moved")
    assert len(hashed) == 1


def test_a_file_that_changed_just_now_is_not_remembered(large):
    path, hashed = large
    write(path, b"new", age=0.0)
    write(path, b"newer one", age=0.0)
    for _ in range(2):
        assert checksums.known_sha256(path) == digest(path)
    assert len(hashed) == 2


def test_a_small_file_is_always_read(large, tmp_path):
    _, hashed = large
    write(tmp_path / "small", b"abc")
    for _ in range(2):
        checksums.known_sha256(tmp_path / "small")
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_or_read_is_no_error(large, tmp_path):
    path, hashed = large
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert checksums.known_sha256(path) == checksums.known_sha256(path) == digest(path)
    assert len(hashed) == 2
