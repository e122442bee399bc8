"""What was answered, a line each, written by one process alone: a job that is killed goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmtrim.runtime.errors import RuntimeRefusal

ROWS = 4096  # of a Parquet file that are in memory at once


class Journal:
    """Lines of JSON, each a row's record, each id once.

    ``OUT.jsonl`` is the journal itself; for ``OUT.parquet`` it is ``OUT.parquet.jsonl``, and :meth:`finish` writes the
    table from it. ``OUT.job.json`` says what was asked, so that answers to something else are not mixed.

    Args:
        output: ``.jsonl`` or ``.parquet``.
        job: what decides the answers; must be the same where the output is gone on with.
        again: ask rows again whose record is an error.

    Raises RuntimeRefusal where the output is of another job, being written by another process, or cannot be written.
    """

    def __init__(self, output: str, job: dict[str, Any], again: bool = False):
        self.output = Path(output)
        if self.output.suffix not in (".jsonl", ".parquet"):
            raise RuntimeRefusal(f"--output is {output}; give a name that ends in .jsonl or .parquet")
        table = self.output.suffix == ".parquet"
        self.path = self.output.with_name(self.output.name + ".jsonl") if table else self.output
        self.done: set[str] = set()
        self.errors = 0
        try:
            self._claim(job)
            self._read()
            if again and self.errors:
                self._drop_errors()
            self._stream = self.path.open("ab")
        except OSError as error:
            raise RuntimeRefusal(f"{output} cannot be written ({error.strerror}); give another --output") from error

    def write(self, name: str, line: str, failed: bool) -> bool:
        """Keep a record; False where the id has one already."""
        if name in self.done:
            return False
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()  # to the system: a kill of this process loses nothing
        self.done.add(name)
        self.errors += failed
        return True

    def finish(self) -> None:
        """Write the table, where one is wanted, in one step."""
        if self.path == self.output:
            return
        import pyarrow
        import pyarrow.parquet

        passing = self.output.with_name(self.output.name + ".part")
        with pyarrow.parquet.ParquetWriter(passing, _schema()) as writer:
            for records in self._records():
                writer.write_table(pyarrow.Table.from_pylist(records, schema=_schema()))
        os.replace(passing, self.output)

    def close(self) -> None:
        """Let others go on with it."""
        self._stream.close()
        self._claimed.close()

    def _claim(self, job: dict[str, Any]) -> None:
        side = self.output.with_name(self.output.name + ".job.json")
        if self.path.exists() and not side.exists():
            raise RuntimeRefusal(f"{self.path} is there and no output of batch-vlm ({side.name} is missing); remove it")
        self._claimed = side.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeRefusal(f"another batch-vlm writes to {self.output}; wait for it") from error
        self._claimed.seek(0)
        before = self._claimed.read()
        text = json.dumps(job, indent=1)
        if not before or not self.path.exists() or not self.path.stat().st_size:
            self._claimed.truncate(0)
            self._claimed.write(text)
            self._claimed.flush()
        elif before != text:
            raise RuntimeRefusal(
                f"{self.output} holds answers to something else ({_difference(before, job)}); give another --output"
            )

    def _read(self) -> None:
        """What is there; a line that a kill has cut is taken off."""
        if not self.path.exists():
            return
        whole = 0
        with self.path.open("r+b") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                self.done.add(record["id"])
                self.errors += record["error"] is not None
                whole += len(line)
            stream.truncate(whole)

    def _drop_errors(self) -> None:
        passing = self.path.with_name(self.path.name + ".part")
        self.done, self.errors = set(), 0
        with passing.open("wb") as stream:
            for records in self._records():
                for record in records:
                    if record["error"] is None:
                        stream.write(json.dumps(record).encode() + b"\n")
                        self.done.add(record["id"])
        os.replace(passing, self.path)

    def _records(self) -> Iterator[list[dict[str, Any]]]:
        records: list[dict[str, Any]] = []
        with self.path.open("rb") as stream:
            for line in stream:
                records.append(json.loads(line))
                if len(records) == ROWS:
                    yield records
                    records = []
        yield records


def _difference(before: str, job: dict[str, Any]) -> str:
    """Names of what differs."""
    try:
        told = json.loads(before)
        return ", ".join(name for name in job if told.get(name) != job[name]) or "another version's"
    except (ValueError, AttributeError):
        return "its .job.json is damaged"


def _schema() -> Any:
    import pyarrow

    texts, counts = ("id", "prompt", "answer", "ended", "error"), ("queued_s", "prefill_s", "decode_s")
    numbers = ("prompt_tokens", "answer_tokens", "visual_tokens", "kept", "removed")
    kinds = dict.fromkeys(texts, pyarrow.string()) | dict.fromkeys(numbers, pyarrow.int64())
    return pyarrow.schema((kinds | dict.fromkeys(counts, pyarrow.float64())).items())
