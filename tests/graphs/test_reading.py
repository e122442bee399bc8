"""reading.py: only plain, listed, regular files; JSON within limits; values by type and range."""

from __future__ import annotations

import json
import os

import pytest

from vlmtrim.graphs import reading
from vlmtrim.graphs.reading import BundleError, Folder


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "bundle"
    made.mkdir()
    (made / "a.json").write_text('{"x": [1, "]}"]}')
    (made / "b.json").write_text("{}")
    (tmp_path / "outside.json").write_text("{}")
    return made


def test_a_listed_file_is_read(folder):
    files = Folder(folder, ["a.json"])
    assert files.json("a.json") == {"x": [1, "]}"]}
    assert files.bytes("a.json") == b'{"x": [1, "]}"]}'
    assert files.file("a.json") == folder / "a.json"
    assert "a.json" in files and "b.json" not in files


def test_without_a_list_every_regular_file_of_the_folder_is_read(folder):
    assert "b.json" in Folder(folder) and "c.json" not in Folder(folder)
    assert Folder(folder).json("b.json") == {}


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(folder, name):
    for files in (Folder(folder), Folder(folder, [name])):
        with pytest.raises(BundleError, match="no plain file name"):
            files.bytes(name)
        assert name not in files


def test_a_file_that_is_not_listed_is_refused_though_it_is_there(folder):
    with pytest.raises(BundleError, match=r"b\.json is not listed"):
        Folder(folder, ["a.json"]).text("b.json")


def test_links_pipes_and_folders_are_refused_at_once(folder, tmp_path):
    (folder / "link.json").symlink_to(tmp_path / "outside.json")
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / "device.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    for name, says in [
        ("link.json", "is a link"),
        ("loop.json", "is a link"),
        ("device.json", "is a link"),
        ("pipe.json", "no regular file"),
        ("folder.json", "no regular file"),
        ("nowhere.json", "No such file"),
    ]:
        with pytest.raises(BundleError, match=says):
            Folder(folder).bytes(name)


def test_a_file_beyond_its_limit_is_refused(folder):
    with pytest.raises(BundleError, match=r"a\.json has more than 4 bytes"):
        Folder(folder).bytes("a.json", limit=4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"\xff\xfe", "no UTF-8 text"),
        (b"[]", "holds a list; expected an object"),
        (b"3", "holds a number"),
        (b"", "no valid JSON"),
        (b'{"x": NaN}', "NaN is no number"),
        (b'{"x": -Infinity}', "Infinity is no number"),
        (b'{"x": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}", "nests 66 deep; the limit is 64"),
        (b"[" * 1_000_000, "nests 1000000 deep"),
    ],
)
def test_what_is_no_object_within_limits_is_refused_by_name(folder, text, says):
    (folder / "a.json").write_bytes(text)
    with pytest.raises(BundleError, match=says) as caught:
        Folder(folder).json("a.json")
    assert str(folder / "a.json") in str(caught.value) and "\n" not in str(caught.value)


def test_brackets_inside_strings_do_not_nest():
    assert reading.json_object(json.dumps({"x": "[" * 1000, '"[': "\\"}), "f") == {"x": "[" * 1000, '"[': "\\"}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 11, 10**400, [1], {"a": 1}])
def test_an_integer_of_another_type_or_range_is_refused(value):
    with pytest.raises(BundleError, match=r"edge is .*; expected an integer from 0 to 10") as caught:
        reading.integer(value, "edge", 0, 10)
    assert len(str(caught.value)) < 200
    assert reading.integer(10, "edge", 0, 10) == 10


@pytest.mark.parametrize("value", [False, float("nan"), float("inf"), "1", None, 1.5, 10**400])
def test_a_number_of_another_type_or_range_is_refused(value):
    with pytest.raises(BundleError, match=r"share is .*; expected a number from 0 to 1"):
        reading.number(value, "share", 0, 1)
    assert reading.number(1, "share", 0, 1) == 1.0


def test_booleans_and_texts_are_checked_too():
    assert reading.boolean(False, "on") is False and reading.text("x", "name") == "x"
    with pytest.raises(BundleError, match="on is 1; expected true or false"):
        reading.boolean(1, "on")
    for value in (1, None, "y" * 11, ["x"]):
        with pytest.raises(BundleError, match=r"name is .*; expected a text of at most 10 characters"):
            reading.text(value, "name", most=10)
