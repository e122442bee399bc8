"""Where two backends part: every graph is fed what the same graph was fed on the other side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.backends.base import Backend, Tensor
from vlmtrim.runtime.measure.check import Recording, Row, Turn, compare, difference, record
from vlmtrim.runtime.measure.watch import Run, watch
from vlmtrim.runtime.session import Session

# Graph -> (its output, how a row calls it); the decoder's outputs are compared by check.compare.
_STAGES = {"vision": ("image_features", "vision: features"), "embed": ("inputs_embeds", "embed: embeddings")}


@dataclass
class Tape:
    """What the graphs of a session gave, run by run, on the host: (graph, outputs)."""

    runs: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)


class Recorder:
    """A session that notes what its graphs give."""

    def __init__(self, bundle: Bundle, backend: Backend):
        self._backend = backend
        self._tape = Tape()
        self._session = Session(bundle, watch(backend, self._note))

    def record(self, turn: Turn, tokens: int) -> tuple[Recording, list[int], Tape]:
        """Like :func:`vlmtrim.runtime.measure.check.record`, with the tape of the turn."""
        self._tape = Tape()
        recording, fed = record(self._session, turn, tokens)
        return recording, fed, self._tape

    def _note(self, graph: str, feeds: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
        outputs = run(feeds)
        name = _STAGES.get(graph, ("", ""))[0]
        self._tape.runs.append((graph, {name: self._backend.to_host(outputs[name])} if name else {}))
        return outputs


class Replayer:
    """A session like any other; in :meth:`compare` each of its graphs takes what the recorder's graphs gave."""

    def __init__(self, bundle: Bundle, backend: Backend):
        self._backend = backend
        self._dtype = bundle.contract.dtype
        self._groups = [group.layers for group in bundle.contract.groups]
        self.session = Session(bundle, watch(backend, self._substitute))
        self._left: list[tuple[str, dict[str, np.ndarray]]] | None = None
        self._given: dict[str, np.ndarray] = {}  # what the recorder computed since its last decoder run
        self._found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def compare(self, turn: Turn, expected: Recording, tokens: Sequence[int], tape: Tape) -> list[Row]:
        """Rows of a turn, graph by graph. Turns must come in the order in which they were recorded."""
        self._left, self._found, self._given = list(tape.runs), {}, {}
        recording, _ = record(self.session, turn, tokens)
        self._left = None
        rows = []
        for graph, (_, what) in _STAGES.items():
            if pairs := self._found.get(graph):
                rows.append(difference(turn.name, what, pairs, self._dtype))
        decoder = compare(turn.name, recording, expected, self._groups, self._dtype)
        return rows + [replace(row, what=f"decoder: {row.what}") for row in decoder]

    def _substitute(self, graph: str, feeds: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
        if self._left is None:
            return run(feeds)
        name, given = self._left.pop(0)
        assert name == graph, f"the recorder ran {name}, now {graph} runs"
        outputs = run({**feeds, **{fed: self._as_fed(fed) for fed in feeds if fed in self._given}})
        for output, expected in given.items():
            self._found.setdefault(graph, []).append((self._backend.to_host(outputs[output]), expected))
        self._given = {} if graph == "decoder" else {**self._given, **given}
        return outputs

    def _as_fed(self, name: str) -> dtypes.HostArray:
        """[rows, tokens, width], whatever shape the vision graph gave it."""
        value = self._given[name]
        rows = np.ascontiguousarray(value.reshape(self.session.batch, -1, value.shape[-1]))
        return dtypes.cast(rows, self._dtype)
