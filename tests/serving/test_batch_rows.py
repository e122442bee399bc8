"""Rows of a batch and its journal, without Ray: pieces, what is skipped, bad rows, one writer, a cut line."""

from __future__ import annotations

import json

import pytest

from vlmtrim.runtime.batch.journal import Journal
from vlmtrim.runtime.batch.rows import Piece, pieces, rows
from vlmtrim.runtime.errors import RuntimeRefusal

pyarrow = pytest.importorskip("pyarrow", reason="the extra ray is not installed")
JOB = {"bundle": "a", "prompt": "What?"}
RECORD = {"prompt": "", "answer": "x", "error": None}


def read(source, prompt=None, done=(), most=3):
    """All rows, by way of the text that a piece travels as."""
    found = pieces(str(source), prompt, done, most)
    assert all(piece.left > 0 for piece in found)
    return [row for piece in found for row in rows(Piece.of(piece.text()), prompt)]


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    for name in ("b.png", "a.PNG", "below/c.jpeg", "notes.txt", "d.gif", "e.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture.read_bytes())
    return folder


def test_a_folder_is_its_pictures_by_name(pictures):
    found = read(pictures, "What?")
    assert [row.id for row in found] == ["a.PNG", "b.png", "below/c.jpeg", "d.gif", "e.webp"]
    assert {row.prompt for row in found} == {"What?"} and found[2].images == (str(pictures / "below/c.jpeg"),)
    assert [row.id for row in read(pictures, "What?", {"b.png", "e.webp"})] == ["a.PNG", "below/c.jpeg", "d.gif"]
    assert [piece.left for piece in pieces(str(pictures), "What?", (), 2)] == [2, 2, 1]
    with pytest.raises(RuntimeRefusal, match="give --prompt TEXT"):
        pieces(str(pictures), None, (), 2)


LINES = [
    b'{"image": "a.png", "prompt": "One?"}',
    b"",
    b'{"id": "named", "image": ["a.png", "data:image/png;base64,AAAA"], "prompt": "Two?"}',
    b'{"image": ',
    b"[1]",
    b'{"id": 7, "image": 5, "prompt": "Three?"}',
    b'{"image": {"bytes": null, "path": "a.png"}}',
    b'{"prompt": ["no text"]}',
    b'{"image": null, "prompt": "Words alone?"}',
    b"\xff",
]


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_lines_are_rows_wherever_pieces_begin(tmp_path, most):
    path = tmp_path / "asked.jsonl"
    path.write_bytes(b"\n".join(LINES))
    found = {row.id: row for row in read(path, most=most)}
    names = ["asked.jsonl:1", "named", *(f"asked.jsonl:{n}" for n in (4, 5)), "7"]
    names += [f"asked.jsonl:{n}" for n in (7, 8, 9, 10)]
    assert list(found) == names
    assert found["asked.jsonl:1"].images == (str(tmp_path / "a.png"),) and found["asked.jsonl:9"].images == ()
    assert found["named"].images == (str(tmp_path / "a.png"), "data:image/png;base64,AAAA")
    wrong = {name: row.error for name, row in found.items() if row.error}
    said = [
        "is no JSON;",
        "is no JSON object",
        "its image is of type int",
        "has no prompt",
        "its prompt is of type list",
    ]
    assert all(text in error for text, error in zip([*said, "is no JSON;"], wrong.values(), strict=True))
    assert read(path, "Given?", most=most)[5].prompt == "Given?"
    done = {"asked.jsonl:1", "7", "asked.jsonl:9"}
    assert [row.id for row in read(path, done=done, most=most)] == [name for name in names if name not in done]


def table(path, rows_, groups):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_), path, row_group_size=groups)
    return path


def test_tables_are_rows_group_by_group(tmp_path, picture):
    data = picture.read_bytes()
    made = [{"id": f"r{n}", "image": {"bytes": data, "path": None}, "prompt": f"{n}?", "label": n} for n in range(20)]
    path = table(tmp_path / "a.parquet", made, 9)
    assert [piece.count for piece in pieces(str(path), None, (), 2)] == [9, 9, 2]
    found = read(path)
    assert [(row.id, row.prompt, row.images) for row in found] == [(f"r{n}", f"{n}?", (data,)) for n in range(20)]
    assert [row.id for row in read(path, done={f"r{n}" for n in range(9)} | {"r19"})] == [f"r{n}" for n in range(9, 19)]
    table(tmp_path / "b.parquet", [{"image": data}, {"image": None}], 1)
    found = read(tmp_path, "What?", done={"b.parquet:0"})
    assert [row.id for row in found] == [*(f"r{n}" for n in range(20)), "b.parquet:1"] and found[-1].images == ()
    with pytest.raises(RuntimeRefusal, match="no column prompt, only image; give --prompt"):
        pieces(str(tmp_path / "b.parquet"), None, (), 2)


def test_what_cannot_be_asked_is_said_in_a_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "words.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    for name, said in [
        ("none", "is no file or folder that can be asked"),
        ("words.txt", "is no file or folder that can be asked"),
        ("folder", "holds no pictures"),
        ("empty.jsonl", "has no lines"),
        ("bad.parquet", "is no Parquet file, or a damaged one"),
    ]:
        with pytest.raises(RuntimeRefusal, match=said):
            pieces(str(tmp_path / name), "What?", (), 2)


def record(name, **fields):
    return json.dumps({"id": name, **RECORD, **fields})


def test_a_journal_goes_on_behind_a_cut_line_and_keeps_an_id_once(tmp_path):
    path = tmp_path / "out.jsonl"
    journal = Journal(str(path), JOB)
    assert journal.write("a", record("a"), False) and journal.write("b", record("b", error="bad"), True)
    assert not journal.write("a", record("a", answer="other"), False)
    with pytest.raises(RuntimeRefusal, match="another batch-vlm writes"):
        Journal(str(path), JOB)
    journal.close()
    path.write_bytes(path.read_bytes() + record("c").encode()[:10])
    journal = Journal(str(path), JOB)
    assert journal.done == {"a", "b"} and journal.errors == 1
    journal.write("c", record("c"), False)
    journal.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    journal = Journal(str(path), JOB, again=True)
    assert journal.done == {"a", "c"} and journal.errors == 0
    journal.close()
    with pytest.raises(RuntimeRefusal, match=r"answers to something else \(prompt\)"):
        Journal(str(path), JOB | {"prompt": "Which?"})


def test_a_table_is_written_from_its_journal(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "out.parquet"
    for names in (["a", "b"], ["c"]):
        journal = Journal(str(path), JOB)
        for name in names:
            journal.write(name, record(name, kept=72, prefill_s=0.5), False)
        journal.finish()
        journal.close()
    found = pyarrow.parquet.read_table(path).to_pylist()
    assert [(row["id"], row["answer"], row["kept"], row["error"]) for row in found] == [
        (name, "x", 72, None) for name in "abc"
    ]


def test_outputs_that_are_none(tmp_path):
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    for name, said in [
        ("out.csv", "ends in .jsonl or .parquet"),
        ("foreign.jsonl", "no output of batch-vlm"),
        ("no/such/out.jsonl", "cannot be written"),
    ]:
        with pytest.raises(RuntimeRefusal, match=said):
            Journal(str(tmp_path / name), JOB)
    assert (tmp_path / "foreign.jsonl").read_text() == "{}\n"
