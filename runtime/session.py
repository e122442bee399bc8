"""Drives a bundle: vision -> embed -> decoder, with the caches of every group and their lengths."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.graphs.contract import BUNDLE, LAST_SEEN, TOKENS, VISION, cache_names
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.attention import Attention
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Tensor
from vlmtrim.runtime.caching import Caching
from vlmtrim.runtime.choosing import Choosing
from vlmtrim.runtime.crossing import Crossing, CrossProcessor
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.fitting import check_kept, check_room, visual_tokens
from vlmtrim.runtime.looking_ahead import last_seen
from vlmtrim.runtime.measure.machine import return_memory
from vlmtrim.runtime.processors.base import Pictures, load_processor
from vlmtrim.runtime.prompt import Prompter
from vlmtrim.runtime.results import Prefill, Times
from vlmtrim.runtime.windows import Windows


@dataclass
class Lengths:
    """How far each row is, int64 [B] each: its first free position, and the cache entries of every group.

    Changed in place: the arrays of a part of the rows are views of all rows'.
    """

    positions: np.ndarray
    entries: list[np.ndarray]

    @staticmethod
    def empty(batch: int, groups: int) -> Lengths:
        """Of conversations that have not begun."""
        return Lengths(np.zeros(batch, np.int64), [np.zeros(batch, np.int64) for _ in range(groups)])

    def part(self, rows: slice) -> Lengths:
        """Of some rows."""
        return Lengths(self.positions[rows], [entries[rows] for entries in self.entries])

    def set(self, positions: np.ndarray | int, entries: Sequence[np.ndarray | int]) -> None:
        """Every row's."""
        self.positions[:] = positions
        for old, new in zip(self.entries, entries, strict=True):
            old[:] = new


class Session:
    """A bundle opened on a backend, holding one conversation per row.

    Every call appends to the caches; :meth:`reset` starts anew, :meth:`close` (or the end of ``with``) frees them. One
    thread at a time: :class:`vlmtrim.runtime.Chat` refuses a second one. ``batch`` rows run together and must bring the
    same number of images to a step; their prompts may differ in length.
    """

    def __init__(self, bundle: Bundle, backend: Backend, batch: int = 1):
        self.bundle = bundle
        self.contract = bundle.contract
        self.backend = backend
        low, high = self.contract.dims["B"]
        if not low <= batch <= high:
            raise RuntimeRefusal(f"batch {batch} is outside the bundle's {low} to {high}; export with --max-batch")
        backend.check(bundle.folder, self.contract)
        self.batch = batch
        self.processor = load_processor(bundle.files, self.contract)
        self.prompter = Prompter(bundle.files, self.contract, self.processor.video_mark)
        # The vision graph is opened with the first image: text-only use should not pay for it.
        self._graphs = {name: backend.open(bundle.folder, self.contract, name) for name in ("embed", "decoder")}
        self.caches = backend.make_caches(self.contract, batch)
        taken = {tensor.name for tensor in self.contract.graphs["decoder"].inputs}
        self._selects, self._sees_ahead = "visual_positions" in taken, LAST_SEEN in taken
        self._choosing = Choosing(self.contract, backend)
        self.attention = Attention(self.contract, backend)
        self.caching = Caching(self.contract, backend, self.caches)
        self._windows = Windows(self.contract, self.caches)
        logits = next(tensor for tensor in self.contract.graphs["decoder"].outputs if tensor.name == "logits")
        self._vocabulary = int(logits.shape[-1])
        self.lengths, self.times = Lengths.empty(batch, len(self.contract.groups)), Times()
        self._crossing = None
        if isinstance(self.processor, CrossProcessor):
            self._crossing = Crossing(self.contract, self.processor, batch)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs, weights and caches. What is run afterwards is refused."""
        self._graphs.clear()
        self.caches.clear()
        return_memory()

    def part(self, first: int, count: int) -> Session:
        """Rows ``first`` to ``first + count`` as a session, on the same graphs and caches.

        What either does to a row is done to both, but for what a cache policy and :class:`Attention` remember: a part
        begins those anew. The session stays the owner: it is the one to close.
        """
        rows, part = slice(first, first + count), copy.copy(self)
        part.batch, part.times, part.lengths = count, Times(), self.lengths.part(rows)
        part.caches = {name: self.backend.rows(cache, first, count) for name, cache in self.caches.items()}
        part.attention = Attention(self.contract, self.backend)
        part.caching = Caching(self.contract, self.backend, part.caches)
        part._windows = Windows(self.contract, part.caches)
        part._crossing = None if self._crossing is None else self._crossing.part(rows)
        return part

    def take_over(self, other: Session) -> None:
        """Go on with the conversations of another part of the same session, but for what is in its caches."""
        self.lengths.set(other.lengths.positions, other.lengths.entries)
        self.caching.take_over(other.caching)
        if self._crossing is not None and other._crossing is not None:
            self._crossing.take_over(other._crossing)

    def open_all(self) -> None:
        """Open every graph that a question may need."""
        for name in self.contract.wholes:
            self._graph(name)

    def _graph(self, name: str) -> Graph | Chain:
        if "decoder" not in self._graphs:
            raise RuntimeRefusal("the session is closed; open the bundle again")
        if name not in self._graphs:
            self._graphs[name] = self.backend.open(self.bundle.folder, self.contract, name)
        return self._graphs[name]

    def reset(self) -> None:
        """Forget the conversation; the caches are reused."""
        self._graph("decoder")
        self.lengths.set(0, [0] * len(self.contract.groups))
        self.times = Times()
        self.attention.forget()
        self.caching.reset()
        if self._crossing is not None:
            self._crossing.reset()

    def encode_images(self, pictures: Pictures) -> Tensor:
        """Pictures -> features on the device, [B, N, D], pictures in row order."""
        return self._encode(pictures)[0]

    def _encode(self, pictures: Pictures) -> tuple[Tensor, Tensor | None]:
        """Features, and what the vision tower looks at where that ranks the visual tokens, [B, N]."""
        dtype = self.contract.dtype
        feeds = {n: dtypes.cast(v, dtype) if v.dtype == np.float32 else v for n, v in pictures.inputs.items()}
        outputs, visual = self._graph("vision").run(feeds), self._visual(pictures)
        features = self.backend.reshape(outputs["image_features"], (self.batch, visual, self.contract.feature_width))
        if self.contract.guide != VISION:
            return features, None
        return features, self.backend.reshape(outputs["visual_attention"], (self.batch, visual))

    def _visual(self, pictures: Pictures | None) -> int:
        return visual_tokens(self.contract, pictures, self.batch)

    def prefill(
        self, rows: Sequence[Sequence[int]], pictures: Pictures | None = None, guide: np.ndarray | None = None
    ) -> Prefill:
        """Run new tokens of every row, image tokens already repeated.

        Args:
            rows: token ids, one sequence per row; shorter rows are padded on the right. The text of a single row may
                be longer than a step of the bundle.
            pictures: all rows' pictures in order, as ``processor`` makes them, or None.
            guide: what each row's visual tokens are ranked by, float32 [B, N], where the contract's guide is another
                bundle; for a step without visual tokens it may be left out.
        """
        ids, counts, visual_positions = self._pack(rows)
        marks = visual_positions.shape[1] * self.batch
        brought = () if pictures is None else pictures.tokens
        if marks != sum(brought):
            raise RuntimeRefusal(f"the prompt holds {marks} image tokens, {len(brought)} image(s) bring {sum(brought)}")
        visual = self._visual(pictures)
        given = self._guide_scores(guide, visual_positions.shape)
        check_room(self.contract, self.lengths.entries, ids.shape[1], visual)
        if ids.shape[1] > self.contract.dims["S"][1]:
            return self._in_steps(rows[0])
        start = self.backend.mark()
        features, seen = (self._no_features(), None) if pictures is None else self._encode(pictures)
        middle = self.backend.mark()
        given = given if seen is None else {"guide_scores": seen}
        watched = self.caching.rows(counts, visual_positions)
        given |= self.caching.feeds(watched)
        positions = self.processor.positions(ids, counts, self.lengths.positions, pictures)
        before = [entries.copy() for entries in self.lengths.entries]
        outputs, kept_features = self._step(ids, counts, visual_positions, features, positions, pictures, given)
        logits = self.backend.to_host(outputs["logits"])
        kept_indices = scores = None
        kept_by_layer = self._choosing.kept(outputs, counts, visual)
        if self._selects and not self._choosing:
            kept = self.backend.to_host(outputs["kept_indices"])
            check_kept(self.contract, kept.shape[1], ids.shape[1], visual)
            kept_indices = [row[row < count] for row, count in zip(kept, counts, strict=True)]
            scores = self.backend.to_host(outputs["visual_scores"])
        self.times.vision += self.backend.elapsed(start, middle)
        end = self.backend.mark()
        self.times.prefill += self.backend.elapsed(middle, end)
        held = None
        if self.caching:
            taken = self.caching.taken(counts, kept_indices, kept_by_layer)
            left = self.caching.after(self._graph, outputs, watched, visual_positions, taken, before)
            self.lengths.set(self.lengths.positions, left.entries)
            held = left.held
            self.times.caches += self.backend.elapsed(end, self.backend.mark())
        kept_visual = self.contract.groups[-1].length(visual, visual)
        if kept_features is not None:
            kept_visual = max(map(len, kept_features))
        if kept_by_layer is not None:
            text = counts - visual
            kept_visual = max(
                round(np.mean([len(rows[row]) for rows in kept_by_layer]) - text[row]) for row in range(self.batch)
            )
        return Prefill(
            logits, visual, kept_visual, kept_indices, visual_positions, scores, kept_features, kept_by_layer, held
        )

    def _in_steps(self, text: Sequence[int]) -> Prefill:
        """The text of a single row that is longer than a step; all of it is kept."""
        longest = self.contract.dims["S"][1]
        parts = [self.prefill([text[first : first + longest]]) for first in range(0, len(text), longest)]
        kept = None if parts[-1].kept_indices is None else [np.arange(len(text))]
        return dataclasses.replace(parts[-1], kept_indices=kept)

    def decode(self, tokens: np.ndarray, live: np.ndarray | None = None) -> np.ndarray:
        """Run one token per row (int64 [B]); returns logits [B, V].

        Rows that are not ``live`` (bool [B]) run along without growing: what they write is overwritten later.
        """
        live = np.ones(self.batch, dtype=bool) if live is None else live
        start = time.perf_counter()
        nothing = np.zeros((self.batch, 0), dtype=np.int64)
        ids, counts = tokens[:, None], live.astype(np.int64)
        positions = self.processor.positions(ids, counts, self.lengths.positions, None)
        rows, before = self.caching.decode_rows(live), [entries.copy() for entries in self.lengths.entries]
        given = self._guide_scores(None, nothing.shape) | self.caching.feeds(rows)
        outputs, _ = self._step(ids, counts, nothing, self._no_features(), positions, None, given, live)
        logits = self.backend.to_host(outputs["logits"])
        grown = self.caching.grown(self._graph, outputs, rows, before, self.lengths.entries)
        self.lengths.set(self.lengths.positions, grown)
        self.times.decode += time.perf_counter() - start
        self.times.steps += 1
        return logits

    def room(self) -> int:
        """Tokens that every row can still take, visual tokens not counted."""
        return min(
            int(group.capacity - entries.max())
            for group, entries in zip(self.contract.groups, self.lengths.entries, strict=True)
            if group.source == TOKENS and not group.window
        )

    def cache_contents(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(keys, values) of every layer as they are filled, [KV, length, Dh]; where it has a window, what is left."""
        contents = {}
        for group, entries in zip(self.contract.groups, self.lengths.entries, strict=True):
            for layer in group.layers:
                key, value = (
                    self.backend.to_host(self.caches[past])[row, :, : entries[row]] for past, _ in cache_names(layer)
                )
                contents[layer] = key, value
        return [contents[layer] for layer in sorted(contents)]

    def _pack(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids [B, S] padded on the right, token counts [B], positions of visual tokens [B, N])."""
        if len(rows) != self.batch or not all(rows):
            raise RuntimeRefusal(f"{len(rows)} prompts for a session of batch {self.batch}; none may be empty")
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.zeros((self.batch, int(counts.max())), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        real = np.arange(ids.shape[1]) < counts[:, None]
        is_visual = (ids == self.contract.image_token_id) & real
        if (outside := real & ~is_visual & ((ids < 0) | (ids >= self._vocabulary))).any():
            raise RuntimeRefusal(
                f"the prompt holds token {ids[outside][0]}, the model has {self._vocabulary}; its tokenizer.json is of "
                "another model"
            )
        per_row = is_visual.sum(axis=1)
        if (per_row != per_row[0]).any():
            what = "images" if self.contract.crosses else "visual tokens"
            raise RuntimeRefusal(
                f"the rows of a batch hold {per_row.tolist()} {what}; rows that run together must bring as many"
            )
        return ids, counts, np.nonzero(is_visual)[1].reshape(self.batch, -1).astype(np.int64)

    def _guide_scores(self, guide: np.ndarray | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The decoder's guide_scores, of ``shape`` [B, N], where another bundle provides them; where the vision graph
        does, those of no picture."""
        if self.contract.guide != BUNDLE:
            if guide is not None:
                raise RuntimeRefusal("scores of a guide are given, and this bundle ranks by its own; leave guide out")
            none = np.zeros((self.batch, 0), dtype=np.float32)
            return {} if self.contract.guide is None else {"guide_scores": none}
        if guide is None and not shape[1]:
            guide = np.zeros(shape, dtype=np.float32)
        if guide is None:
            raise RuntimeRefusal(
                "this bundle ranks visual tokens by scores of another bundle, and none are given: run-vlm with --guide "
                "SMALL, or give guide, float32 [B, N]"
            )
        if guide.shape != shape or guide.dtype != np.float32 or not np.isfinite(guide).all():
            raise RuntimeRefusal(
                f"guide is {guide.dtype} {list(guide.shape)}; give finite float32 {list(shape)}, a score of every "
                "visual token"
            )
        return {"guide_scores": guide}

    def _no_features(self) -> Tensor:
        return dtypes.zeros((self.batch, 0, self.contract.feature_width), self.contract.dtype)

    def _step(
        self,
        ids: np.ndarray,
        counts: np.ndarray,
        visual_positions: np.ndarray,
        features: Tensor,
        positions: tuple[np.ndarray, np.ndarray],
        pictures: Pictures | None,
        given: dict[str, Tensor],
        live: np.ndarray | None = None,
    ) -> tuple[dict[str, Tensor], list[np.ndarray] | None]:
        """Embed and decode; ``positions`` are of the tokens, and each row's first free one after them; ``given`` are
        inputs of the decoder that come from outside; ``live`` are rows of a decode step.

        Returns the decoder's outputs, and the image features that each row kept where there is cross-attention.
        """
        tokens, visual = ids.shape[1], self._visual(pictures)
        merged = {} if self._crossing else {"image_features": features, "visual_positions": visual_positions}
        feeds: dict[str, Tensor] = {
            **self._graph("embed").run({"input_ids": ids, **merged}),
            "position_ids": positions[0],
            "last_index": np.maximum(counts - 1, 0),
            **given,
            **self.attention.feeds(ids.shape[1], counts, visual_positions),
        }
        if self._selects:
            feeds["visual_positions"] = visual_positions
        if self._sees_ahead:
            feeds[LAST_SEEN] = last_seen(tokens, visual_positions)
        grown = [group.length(tokens, visual) for group in self.contract.groups]
        self._windows.make_room(self._graph, self.lengths.entries, grown)
        windows = [
            self.backend.window(max(1, int(entries.max()) + n), group.capacity)
            for group, entries, n in zip(self.contract.groups, self.lengths.entries, grown, strict=True)
        ]
        # of their own: lengths grow in place, and a device may read what it was fed later
        places = self.caching.places([entries.copy() for entries in self.lengths.entries], live)
        for index, group in enumerate(self.contract.groups):
            feeds[f"write_indices.{index}"], limit = places[index]
            if self.caching.rings:
                feeds[f"query_limits.{index}"] = limit
            if group.source == TOKENS:
                feeds[f"key_positions.{index}"] = np.arange(windows[index])
        if self._crossing:
            feeds["image_features"] = features
            feeds |= self._crossing.feeds(ids, counts, pictures, dict(enumerate(windows)))
        decoder = self._graph("decoder")
        decoder.bind_caches(self.caches)
        outputs = decoder.run(feeds)
        self.attention.took(outputs, counts, visual_positions, self.lengths.entries[0])
        added = {index: np.where(counts > 0, n - (tokens - counts), 0) for index, n in enumerate(grown)}
        added |= self._choosing.added(outputs, counts, visual)
        kept = None
        if self._crossing:
            kept, taken = self._crossing.took(outputs, self.backend, self.lengths.entries)
            added |= taken
        entries = [filled + added[index] for index, filled in enumerate(self.lengths.entries)]
        self.lengths.set(positions[1], entries)
        return outputs, kept
