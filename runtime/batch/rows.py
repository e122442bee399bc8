"""What a batch asks: a folder of pictures, JSONL or Parquet as rows, in pieces that are read by who answers them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlmtrim.runtime.errors import RuntimeRefusal

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
FOLDER, JSONL, PARQUET = "folder", "jsonl", "parquet"
COLUMNS = ("id", "image", "prompt")
UNASKED = "has no prompt; add one, or give --prompt"
MOST_PIECES = 2000  # that a job is cut into, so that a large one is not all bookkeeping
TOLD = "give a folder of pictures, a .jsonl or .parquet file, or a folder of .parquet files"


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: by which its answer is known.
        prompt: the words.
        images: pictures before them: paths, ``data:`` URLs, or contents of files.
        error: why it cannot be asked; None where it can.
    """

    id: str
    prompt: str = ""
    images: tuple[str | bytes, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Piece:
    """Rows that one engine reads and answers, one after another in this order.

    Attributes:
        kind: FOLDER, JSONL or PARQUET.
        path: of the folder or file.
        start: byte of a JSONL file, or row group of a Parquet file, where it begins.
        first: number of its first line (from 1) or row (from 0).
        count: rows.
        names: of a folder's pictures.
        skip: which of its rows, counted from 0, are not to be asked.
    """

    kind: str
    path: str
    start: int
    first: int
    count: int
    names: tuple[str, ...] = ()
    skip: tuple[int, ...] = ()

    @property
    def left(self) -> int:
        """Rows to ask."""
        return self.count - len(self.skip)

    def text(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Piece:
        """From :meth:`text`."""
        given = json.loads(text)
        return Piece(**given | {"names": tuple(given["names"]), "skip": tuple(given["skip"])})


def pieces(source: str, prompt: str | None, done: Collection[str], most: int) -> list[Piece]:
    """What is left to ask.

    Args:
        source: folder of pictures (also in folders below it), JSONL or Parquet file, or folder of Parquet files.
        prompt: of rows that have none.
        done: ids that are answered already.
        most: rows of a piece, at most; where there are very many rows, more.

    Raises RuntimeRefusal where there is nothing that could be asked.
    """
    path = Path(source)
    try:
        if path.is_dir():
            tables = sorted(path.glob("*.parquet"))
            found = _tables(tables, prompt, done) if tables else _pictures(path, prompt, done, most)
        elif path.is_file() and path.suffix in (".jsonl", ".ndjson"):
            found = _lines(path, done, most)
        elif path.is_file() and path.suffix == ".parquet":
            found = _tables([path], prompt, done)
        else:
            raise RuntimeRefusal(f"{source} is no file or folder that can be asked; {TOLD}")
    except OSError as error:
        raise RuntimeRefusal(f"{source} cannot be read ({error.strerror or error}); {TOLD}") from error
    return [piece for piece in found if piece.left > 0]


def rows(piece: Piece, prompt: str | None) -> Iterator[Row]:
    """The rows of a piece that are to be asked; what is wrong with one is its ``error``."""
    skip = frozenset(piece.skip)
    for number, row in enumerate(_READERS[piece.kind](piece)):
        if number in skip:
            continue
        if row.error is None and not row.prompt:
            row = replace(row, prompt=prompt or "", error=None if prompt else UNASKED)
        yield row


def _pictures(folder: Path, prompt: str | None, done: Collection[str], most: int) -> list[Piece]:
    if not prompt:
        raise RuntimeRefusal("pictures of a folder need a question; give --prompt TEXT")
    files = (p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    names = sorted(p.relative_to(folder).as_posix() for p in files)
    if not names:
        raise RuntimeRefusal(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))}); {TOLD}")
    left = [name for name in names if name not in done]
    size = max(most, -(-len(left) // MOST_PIECES))
    parts = (tuple(left[at : at + size]) for at in range(0, len(left), size))
    return [Piece(FOLDER, str(folder), 0, 0, len(part), part) for part in parts]


def _read_pictures(piece: Piece) -> Iterator[Row]:
    for name in piece.names:
        yield Row(name, images=(str(Path(piece.path) / name),))


def _lines(path: Path, done: Collection[str], most: int) -> list[Piece]:
    places, skip, offset = [], [], 0  # of every line that is not blank: its byte and number
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                if done and _of_line(path, number, line).id in done:
                    skip.append(len(places))
                places.append((offset, number))
            offset += len(line)
    if not places:
        raise RuntimeRefusal(f"{path} has no lines; {TOLD}")
    size = max(most, -(-len(places) // MOST_PIECES))
    made = []
    for at in range(0, len(places), size):
        count = min(size, len(places) - at)
        own = tuple(number - at for number in skip if at <= number < at + count)
        start, first = places[at]
        made.append(Piece(JSONL, str(path), start, first, count, skip=own))
    return made


def _read_lines(piece: Piece) -> Iterator[Row]:
    path = Path(piece.path)
    with path.open("rb") as stream:
        stream.seek(piece.start)
        numbered = ((number, line) for number, line in enumerate(stream, start=piece.first) if line.strip())
        for number, line in itertools.islice(numbered, piece.count):
            yield _of_line(path, number, line)


def _of_line(path: Path, number: int, line: bytes) -> Row:
    name = f"{path.name}:{number}"
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return Row(name, error="is no JSON; write one object a line")
    if not isinstance(given, dict):
        return Row(name, error="is no JSON object; write one with image and prompt")
    return _row(given, name, path.parent)


def _tables(paths: list[Path], prompt: str | None, done: Collection[str]) -> list[Piece]:
    made = []
    for path in paths:
        table = _open_table(path)
        names = table.schema_arrow.names
        if "prompt" not in names and not prompt:
            raise RuntimeRefusal(f"{path} has no column prompt, only {', '.join(names)}; give --prompt TEXT")
        if "image" not in names:
            raise RuntimeRefusal(f"{path} has no column image, only {', '.join(names)}; name it so")
        first = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            given = table.read_row_group(group, ["id"])["id"].to_pylist() if done and "id" in names else [None] * count
            ids = (_id(own, f"{path.name}:{first + at}") for at, own in enumerate(given))
            skip = tuple(at for at, own in enumerate(ids) if own in done)
            made.append(Piece(PARQUET, str(path), group, first, count, skip=skip))
            first += count
    return made


def _open_table(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise RuntimeRefusal(f"{path} is no Parquet file, or a damaged one; {TOLD}") from error


def _read_table(piece: Piece) -> Iterator[Row]:
    path = Path(piece.path)
    table = _open_table(path)
    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
    number = piece.first
    for batch in table.iter_batches(8, [piece.start], columns):  # few at a time: pictures are large
        for given in batch.to_pylist():
            yield _row(given, f"{path.name}:{number}", path.parent)
            number += 1


def _id(given: Any, otherwise: str) -> str:
    return otherwise if given is None or given == "" else str(given)


def _row(given: dict[str, Any], name: str, folder: Path) -> Row:
    """A row of fields, which may hold anything."""
    own, image, prompt = (given.get(column) for column in COLUMNS)
    own = _id(own, name)
    if prompt is not None and not isinstance(prompt, str):
        return Row(own, error=f"its prompt is of type {type(prompt).__name__}; give a text")
    images = []
    for one in image if isinstance(image, list) else [] if image is None else [image]:
        if isinstance(one, dict):  # as datasets of Hugging Face keep pictures
            one = one.get("bytes") or one.get("path")
        if isinstance(one, str) and one[:5].lower() != "data:" and "://" not in one:
            one = str(folder / one)
        if not isinstance(one, str | bytes):
            return Row(own, prompt or "", error=f"its image is of type {type(one).__name__}; give a path or bytes")
        images.append(one)
    return Row(own, prompt or "", tuple(images))


_READERS: dict[str, Callable[[Piece], Iterator[Row]]] = {
    FOLDER: _read_pictures,
    JSONL: _read_lines,
    PARQUET: _read_table,
}
