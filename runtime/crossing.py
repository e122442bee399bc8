"""Pictures that reach the decoder through cross-attention: which features the caches hold, and which a token sees."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.contract import IMAGES, NO_ENTRY, Contract
from vlmtrim.runtime.backends.base import Backend, Tensor
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures


@dataclass
class View:
    """Where each row's conversation is: pictures so far, the first and the first not that its last token sees, and
    whether that token marks a picture; [B] each."""

    pictures: np.ndarray
    first: np.ndarray
    end: np.ndarray
    at_mark: np.ndarray

    @staticmethod
    def empty(batch: int) -> View:
        """Conversations that have not begun."""
        zero = np.zeros(batch, dtype=np.int64)
        return View(zero.copy(), zero.copy(), zero.copy(), np.zeros(batch, dtype=bool))

    def part(self, rows: slice) -> View:
        """Of some rows, on the same memory."""
        return View(self.pictures[rows], self.first[rows], self.end[rows], self.at_mark[rows])

    def set(self, other: View) -> None:
        """Take over what another one says."""
        for own, new in zip(vars(self).values(), vars(other).values(), strict=True):
            own[:] = new


class CrossProcessor(base.Processor):
    """A processor of a family whose decoder has cross-attention."""

    @abstractmethod
    def image_numbers(self, pictures: Pictures, view: View) -> np.ndarray:
        """``image_numbers`` of the contract for a step's pictures, all rows' in order, int64 [B, N]."""

    @abstractmethod
    def seen_images(self, ids: np.ndarray, counts: np.ndarray, view: View, brings: bool) -> np.ndarray:
        """``seen_images`` of the contract, int64 [B, S, 2]; moves ``view`` on.

        Args:
            ids: int64 [B, S], padded on the right.
            counts: int64 [B], real tokens of each row; 0 for a row that runs along.
            brings: whether image tokens of this step stand for pictures.
        """


class Crossing:
    """What a session feeds to cross-attention and remembers of it. Knows the contract, no family and no method."""

    def __init__(self, contract: Contract, processor: CrossProcessor, batch: int):
        self._processor = processor
        self._groups = [index for index, group in enumerate(contract.groups) if group.source == IMAGES]
        self._held = {i: np.full((batch, contract.groups[i].capacity), NO_ENTRY) for i in self._groups}
        self._view = View.empty(batch)
        self._selects = any(tensor.name == "kept_counts" for tensor in contract.graphs["decoder"].outputs)
        self._numbers = np.zeros((batch, 0), dtype=np.int64)

    def part(self, rows: slice) -> Crossing:
        """Of some rows, on the same memory."""
        part = copy.copy(self)
        part._held = {index: held[rows] for index, held in self._held.items()}
        part._view, part._numbers = self._view.part(rows), self._numbers[rows]
        return part

    def reset(self) -> None:
        """Begin new conversations."""
        self._view.set(View.empty(len(self._view.pictures)))
        for held in self._held.values():
            held[:] = NO_ENTRY

    def take_over(self, other: Crossing) -> None:
        """Go on with the conversations of another one."""
        self._view.set(other._view)
        for index, held in self._held.items():
            held[:] = other._held[index]

    def feeds(
        self, ids: np.ndarray, counts: np.ndarray, pictures: Pictures | None, windows: Mapping[int, int]
    ) -> dict[str, np.ndarray]:
        """Inputs of the decoder for a step but the features; ``windows`` are the live windows of the groups."""
        nothing = np.zeros((len(ids), 0), dtype=np.int64)
        self._numbers = nothing if pictures is None else self._processor.image_numbers(pictures, self._view)
        feeds = {
            "image_numbers": self._numbers,
            "seen_images": self._processor.seen_images(ids, counts, self._view, pictures is not None),
        }
        return feeds | {f"key_images.{i}": self._held[i][:, : windows[i]] for i in self._groups}

    def took(
        self, outputs: Mapping[str, Tensor], backend: Backend, entries: list[np.ndarray]
    ) -> tuple[list[np.ndarray], dict[int, np.ndarray]]:
        """What a step added: per row the kept features (indices in N), and per group the entries, int64 [B]."""
        everything = np.arange(self._numbers.shape[1])
        kept = [everything] * len(self._numbers)
        if self._selects and everything.size:
            returned = [outputs[name] for name in ("kept_features", "kept_counts")]  # a chain has read them already
            found, counts = (v if isinstance(v, np.ndarray) else backend.to_host(v) for v in returned)
            kept = [row[:count] for row, count in zip(found, counts, strict=True)]
            if not all(_ascending_below(row, count, everything.size) for row, count in zip(kept, counts, strict=True)):
                raise RuntimeRefusal("the decoder names kept image features that there are not; export the model again")
        for index in self._groups:
            ends = [start + len(features) for start, features in zip(entries[index], kept, strict=True)]
            if max(ends) > self._held[index].shape[1]:
                raise RuntimeRefusal("the decoder kept more image features than fit its caches; export the model again")
            for row, (features, start) in enumerate(zip(kept, entries[index], strict=True)):
                self._held[index][row, start : start + len(features)] = self._numbers[row][features]
        growth = np.array([len(features) for features in kept], dtype=np.int64)
        return kept, dict.fromkeys(self._groups, growth)


def _ascending_below(indices: np.ndarray, count: int, size: int) -> bool:
    """Whether ``count`` ascending numbers from 0 up, below ``size``, stand there."""
    return len(indices) == count and bool((np.diff(indices, prepend=-1) > 0).all() and (indices < size).all())
