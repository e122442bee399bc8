"""Drives a bundle: vision -> embed -> decoder, with the caches of every group and their lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmtrim.graphs.bundle import Bundle
from vlmtrim.graphs.contract import BUNDLE, IMAGES, TOKENS, VISION, cache_names
from vlmtrim.runtime import dtypes
from vlmtrim.runtime.attention import Attention
from vlmtrim.runtime.backends.base import Backend, Chain, Graph, Tensor
from vlmtrim.runtime.caching import Caching
from vlmtrim.runtime.choosing import Choosing
from vlmtrim.runtime.crossing import Crossing, CrossProcessor
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.measure.machine import return_memory
from vlmtrim.runtime.processors.base import Pictures, load_processor
from vlmtrim.runtime.prompt import Prompter


@dataclass
class Times:
    """Seconds spent since the session was opened or reset, and the number of decode steps; ``caches`` is what cutting
    the caches took."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    caches: float = 0.0


@dataclass(frozen=True)
class Prefill:
    """What one prefill did.

    Attributes:
        logits: [B, V] of each row's last token.
        visual, kept: visual tokens (or image features) of this step, and how many the last layers keep; where that
            depends on the data, of the row that keeps most, and where every layer chooses, its mean over the layers.
        kept_indices: per row, indices into its new tokens that survive, ascending; None where nothing is selected.
        visual_positions: indices of the visual tokens among each row's new tokens, [B, N].
        visual_scores: what the visual tokens were ranked by, float32 [B, N]; None where nothing is selected.
        kept_features: per row, indices into the step's image features that the caches took, ascending; None where
            pictures are tokens.
        kept_by_layer: per layer and row, indices into its new tokens that survive, where layers choose by themselves.
        held: per layer and row, the new tokens that a cache policy left in the caches, [X, n] of X sets; None without.
    """

    logits: np.ndarray
    visual: int
    kept: int
    kept_indices: list[np.ndarray] | None
    visual_positions: np.ndarray
    visual_scores: np.ndarray | None
    kept_features: list[np.ndarray] | None = None
    kept_by_layer: list[list[np.ndarray]] | None = None
    held: list[list[np.ndarray]] | None = None

    def layers_that_hold(self, row: int) -> np.ndarray:
        """Share of a layer's sets that hold each of a row's visual tokens, float64 [layers, N]; none without policy."""
        positions = self.visual_positions[row]
        return np.array([[np.isin(positions, one) for one in rows[row]] for rows in self.held or []]).mean(axis=1)

    def layers_that_keep(self, row: int) -> np.ndarray:
        """Which of a row's visual tokens each layer keeps, bool [layers, N]; of no layer where none chooses."""
        return np.array([np.isin(self.visual_positions[row], rows[row]) for rows in self.kept_by_layer or []])

    def survivors(self, row: int) -> np.ndarray:
        """Which of a row's visual tokens survive, in any layer, bool [N]; all of them where nothing is selected."""
        if self.kept_by_layer is not None:
            return np.asarray(self.layers_that_keep(row).any(axis=0))
        if self.kept_indices is None:
            return np.ones(self.visual_positions.shape[1], dtype=bool)
        return np.isin(self.visual_positions[row], self.kept_indices[row])


@dataclass
class Lengths:
    """How far each row is, int64 [B] each: its first free position, and the cache entries of every group."""

    positions: np.ndarray
    entries: list[np.ndarray] = field(default_factory=list)


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
        self.prompter = Prompter(bundle.files, self.contract)
        self.processor = load_processor(bundle.files, self.contract)
        # The vision graph is opened with the first image: text-only use should not pay for it.
        self._graphs = {name: backend.open(bundle.folder, self.contract, name) for name in ("embed", "decoder")}
        self._open = True
        self.caches = backend.make_caches(self.contract, batch)
        self._graphs["decoder"].bind_caches(self.caches)
        self._selects = any(tensor.name == "visual_positions" for tensor in self.contract.graphs["decoder"].inputs)
        self._choosing = Choosing(self.contract, backend)
        self.attention = Attention(self.contract, backend)
        self.caching = Caching(self.contract, backend, self.caches)
        logits = next(tensor for tensor in self.contract.graphs["decoder"].outputs if tensor.name == "logits")
        self._vocabulary = int(logits.shape[-1])
        self.reset()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs, weights and caches. What is run afterwards is refused."""
        self._open = False
        self._graphs.clear()
        self.caches = {}
        return_memory()

    def _graph(self, name: str) -> Graph | Chain:
        if not self._open:
            raise RuntimeRefusal("the session is closed; open the bundle again")
        if name not in self._graphs:
            self._graphs[name] = self.backend.open(self.bundle.folder, self.contract, name)
        return self._graphs[name]

    def reset(self) -> None:
        """Forget the conversation; the caches are reused."""
        self._graph("decoder")
        zero = np.zeros(self.batch, dtype=np.int64)
        self.lengths = Lengths(zero.copy(), [zero.copy() for _ in self.contract.groups])
        self.times = Times()
        self.attention.forget()
        self.caching.reset()
        self._crossing = None
        if isinstance(self.processor, CrossProcessor):
            self._crossing = Crossing(self.contract, self.processor, self.batch)

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
        """Visual tokens, or image features, that the pictures bring to each row."""
        if pictures is None:
            return 0
        if self.contract.crosses:
            return len(pictures.tokens) * self.contract.image_tokens // self.batch
        return sum(pictures.tokens) // self.batch

    def prefill(
        self, rows: Sequence[Sequence[int]], pictures: Pictures | None = None, guide: np.ndarray | None = None
    ) -> Prefill:
        """Run new tokens of every row, image tokens already repeated.

        Args:
            rows: token ids, one sequence per row; shorter rows are padded on the right.
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
        self._check_room(ids.shape[1], visual, counts)
        start = self.backend.mark()
        features, seen = (self._no_features(), None) if pictures is None else self._encode(pictures)
        middle = self.backend.mark()
        given = given if seen is None else {"guide_scores": seen}
        watched = self.caching.rows(counts, visual_positions)
        given |= self.caching.feeds(watched)
        positions = self.processor.positions(ids, counts, self.lengths.positions, pictures)
        before = list(self.lengths.entries)
        outputs, kept_features = self._step(ids, counts, visual_positions, features, positions, pictures, given)
        logits = self.backend.to_host(outputs["logits"])
        kept_indices = scores = None
        kept_by_layer = self._choosing.kept(outputs, counts, visual)
        if self._selects and not self._choosing:
            kept = self.backend.to_host(outputs["kept_indices"])
            self._check_kept(kept.shape[1], ids.shape[1], visual)
            kept_indices = [row[row < count] for row, count in zip(kept, counts, strict=True)]
            scores = self.backend.to_host(outputs["visual_scores"])
        self.times.vision += self.backend.elapsed(start, middle)
        end = self.backend.mark()
        self.times.prefill += self.backend.elapsed(middle, end)
        held = None
        if self.caching:
            taken = self.caching.taken(counts, kept_indices, kept_by_layer)
            left = self.caching.after(self._graph, outputs, watched, visual_positions, taken, before)
            self.lengths.entries, held = left.entries, left.held
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

    def decode(self, tokens: np.ndarray, live: np.ndarray | None = None) -> np.ndarray:
        """Run one token per row (int64 [B]); returns logits [B, V].

        Rows that are not ``live`` (bool [B]) run along without growing: what they write is overwritten later.
        """
        live = np.ones(self.batch, dtype=bool) if live is None else live
        start = time.perf_counter()
        nothing = np.zeros((self.batch, 0), dtype=np.int64)
        ids, counts = tokens[:, None], live.astype(np.int64)
        positions = self.processor.positions(ids, counts, self.lengths.positions, None)
        rows, before = self.caching.decode_rows(live), list(self.lengths.entries)
        given = self._guide_scores(None, nothing.shape) | self.caching.feeds(rows)
        outputs, _ = self._step(ids, counts, nothing, self._no_features(), positions, None, given, live)
        logits = self.backend.to_host(outputs["logits"])
        self.lengths.entries = self.caching.grown(self._graph, outputs, rows, before, self.lengths.entries)
        self.times.decode += time.perf_counter() - start
        self.times.steps += 1
        return logits

    def room(self) -> int:
        """Tokens that every row can still take, visual tokens not counted."""
        return min(
            int(group.capacity - entries.max())
            for group, entries in zip(self.contract.groups, self.lengths.entries, strict=True)
            if group.source == TOKENS
        )

    def cache_contents(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(keys, values) of every layer as they are filled, [KV, length, Dh]."""
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

    def _check_room(self, tokens: int, visual: int, counts: np.ndarray) -> None:
        for group, entries in zip(self.contract.groups, self.lengths.entries, strict=True):
            needed = int(entries.max()) + group.length(tokens, visual)
            if needed > group.capacity and group.source == IMAGES:
                held, each, brings = int(entries.max()), self.contract.image_tokens, group.length(tokens, visual)
                raise RuntimeRefusal(
                    f"{visual // each} picture(s) of {each} features bring up to {brings} entries, "
                    f"the caches of the cross-attention layers hold {held} of at most {group.capacity}: give fewer "
                    f"pictures, {'reset the conversation, ' if held else ''}or export with more --images"
                )
            if needed > group.capacity:
                full = int(entries.max())
                raise RuntimeRefusal(
                    f"the prompt has {int(counts.max())} tokens ({visual} visual), {full} are in the caches; layers "
                    f"{group.layers[0]}-{group.layers[-1]} would hold {needed}, their capacity is {group.capacity}: "
                    "shorten the prompt, reset the conversation, or export with a larger --max-seq-len"
                )

    def _check_kept(self, kept: int, tokens: int, visual: int) -> None:
        """Refuse a graph that keeps another number of tokens than the contract says: the caches' lengths would lie."""
        promised = self.contract.groups[-1].length(tokens, visual)
        if kept != promised:
            raise RuntimeRefusal(
                f"the decoder kept {kept} of {tokens} tokens ({visual} visual), its contract promises {promised}; "
                "export the model again"
            )

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
        grown = [group.length(tokens, visual) for group in self.contract.groups]
        windows = [
            self.backend.window(max(1, int(entries.max()) + n), group.capacity)
            for group, entries, n in zip(self.contract.groups, self.lengths.entries, grown, strict=True)
        ]
        places = self.caching.places(self.lengths.entries, live)
        for index, group in enumerate(self.contract.groups):
            feeds[f"write_indices.{index}"], limit = places[index]
            if self.caching.rings:
                feeds[f"query_limits.{index}"] = limit
            if group.source == TOKENS:
                feeds[f"key_positions.{index}"] = np.arange(windows[index])
        if self._crossing:
            feeds["image_features"] = features
            feeds |= self._crossing.feeds(ids, counts, pictures, dict(enumerate(windows)))
        outputs = self._graph("decoder").run(feeds)
        self.attention.took(outputs, counts, visual_positions, self.lengths.entries[0])
        self.lengths.positions = positions[1]
        added = {index: np.where(counts > 0, n - (tokens - counts), 0) for index, n in enumerate(grown)}
        added |= self._choosing.added(outputs, counts, visual)
        kept = None
        if self._crossing:
            kept, taken = self._crossing.took(outputs, self.backend, self.lengths.entries)
            added |= taken
        self.lengths.entries = [entries + added[index] for index, entries in enumerate(self.lengths.entries)]
        return outputs, kept
