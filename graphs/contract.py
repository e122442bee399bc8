"""What the graphs of a bundle promise. Standard library only; stored in the bundle as ``contract.json``.

The exporter writes the contract, a lint checks every graph against it, and the runtimes (Python, C++) read
nothing else: they know tensors, dimensions and cache groups, never the name of a pruning method.

Symbolic dimensions
    B  batch rows             S  tokens of this step          N  visual tokens of this step, per row
    I  images                 R  rows of this step whose attention is summed
    W0, W1, ...  live window of cache group 0, 1, ...
    Sk tokens of this step that survive the selection; Sk0, Sk1, ... in cache group 0, 1, ... where layers choose alone
    Nk image features of this step that enter the caches, at most; Nk1, Nk2, ... visual tokens that a selection in
       stages leaves to cache group 1, 2, ..., where a chain is cut between stages

Decoder graph (D hidden width, V vocabulary, KV key/value heads, Dh head size, C_g capacity of group g)

    ==============================  ========================  ========  ==============================================
    input                           shape                     dtype     meaning
    ==============================  ========================  ========  ==============================================
    inputs_embeds                   [B, S, D]                 model     token embeddings, image features merged in
    position_ids                    [B, S]                    int64     positions in the conversation before any removal
                                                                        (M-RoPE: [3, B, S], time, row and column)
    last_index                      [B]                       int64     index in S of each row's last real token
    score_rows                      [B, R]                    int64     tokens of S whose attention is summed, and
    score_weights                   [B, R]                    float32   how often each counts (only in graphs that
                                                                        return key_scores); R = 0: none. Where queries
                                                                        are returned: :mod:`vlmtrim.graphs.keeping`
    visual_positions                [B, N]                    int64     indices in S of the visual tokens, ascending
                                                                        (only in graphs that select)
    guide_scores                    [B, N]                    float32   what the visual tokens are ranked by, where
                                                                        that comes from outside (``Contract.guide``)
    deepstack_features              [B, S, n D]               model     what is added behind layer 0, 1, .. n-1 to each
                                                                        token's states: features of visual tokens, 0
                                                                        for others (DeepStack, arXiv 2406.04334)
    last_seen                       [B, S]                    int64     index in S of the last token that each one
                                                                        attends to: itself, or the end of the run of
                                                                        visual tokens that it is in (only in graphs
                                                                        whose pictures attend to themselves both ways)
    write_indices.g                 [B]                       int64     where this step's keys go in group g
    key_positions.g                 [W_g]                     int64     0, 1, 2, ...; its length is the live window
    past_key_values.L.key/.value    [B, KV, C_g, Dh]          model     caches of layer L
    ==============================  ========================  ========  ==============================================

    Where pictures reach the decoder through cross-attention, N counts image features, which are no tokens of S:

    ==============================  ========================  ========  ==============================================
    input                           shape                     dtype     meaning
    ==============================  ========================  ========  ==============================================
    image_features                  [B, N, D]                 model     features of this step's pictures
    image_numbers                   [B, N]                    int64     picture of the conversation that each belongs
                                                                        to, from 0; PADDING where it is filling
    seen_images                     [B, S, 2]                 int64     first picture and first picture not that each
                                                                        token sees; SEES_NOTHING where it sees none
    key_images.g                    [B, W_g]                  int64     in place of key_positions.g: image_numbers of
                                                                        the entries so far, NO_ENTRY behind them
    ==============================  ========================  ========  ==============================================

    ==============================  ========================  ========  ==============================================
    output                          shape                     dtype     meaning
    ==============================  ========================  ========  ==============================================
    logits                          [B, V]                    model     of each row's last real token
    key_scores                      [B, W0]                   float32   attention that each entry of the window received
                                                                        from score_rows, summed over layers and heads
    kept_indices                    [B, Sk]                   int64     indices in S that survive (selecting graphs)
    visual_scores                   [B, N]                    float32   what the selection ranked the visual tokens by
    kept_indices.g                  [B, Sk_g]                 int64     indices in S that the layer of a choosing group
                                                                        keeps: text and visual tokens, ascending, and
                                                                        filling behind them
    kept_counts.g                   [B]                       int64     how many visual tokens it keeps, row by row
    kept_features                   [B, Nk]                   int64     indices in N of the features that went into the
                                                                        caches, ascending (graphs that select features)
    kept_counts                     [B]                       int64     how many of them count, row by row
    present.L.key/.value            [B, KV, C_g, Dh]          model     the caches; bind to the buffers of the inputs
    ==============================  ========================  ========  ==============================================

    A graph without weights where a group has a window, run before a step that would not fit behind what it holds:

    ==============================  ========================  ========  ==============================================
    shift graph                     shape                     dtype     meaning
    ==============================  ========================  ========  ==============================================
    in  first_kept                  [B]                       int64     first slot of the ``window`` that moves to 0
    in  past_key_values.key/.value  [B, KV, C_g, Dh]          model     of one layer of the group
    out present.key/.value          [B, KV, C_g, Dh]          model     bind to the buffers of the inputs
    ==============================  ========================  ========  ==============================================
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from vlmtrim.graphs.keeping import CachePolicy
from vlmtrim.graphs.macs import Macs
from vlmtrim.graphs.packed import ROUNDING as ROUNDING
from vlmtrim.graphs.packed import TOWER as TOWER
from vlmtrim.graphs.packed import WITHOUT_ENGINES as WITHOUT_ENGINES
from vlmtrim.graphs.packed import Packed
from vlmtrim.graphs.reading import BundleError, json_object, shown
from vlmtrim.graphs.schema import Among, Range, decode

SCHEMA = 2
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}

_PLAIN = re.compile(r"--[a-z]{1,16} [a-z0-9.-]{1,32}").fullmatch

# What fills the caches of a group, one entry each.
TOKENS, IMAGES = "tokens", "images"
DEEPSTACK, LAST_SEEN = "deepstack_features", "last_seen"
SHIFT = "shift"
# What a method may remove before there are visual tokens: patches of the vision tower.
PATCHES = "patches"
# Who provides guide_scores: the bundle's own vision graph, or another bundle.
VISION, BUNDLE = "vision", "bundle"

# What the fields of contract.json may hold. Sizes are of 31 bits, as in every library that runs the graphs.
Size = Annotated[int, Range(0, 2**31 - 1)]
Count = Annotated[int, Range(1, 2**31 - 1)]
Share = Annotated[float, Range(0, 1)]
Dtype = Annotated[str, Among(tuple(DTYPE_BYTES))]
FloatDtype = Annotated[str, Among(("float32", "float16", "bfloat16"))]
Source = Annotated[str, Among((TOKENS, IMAGES))]
Guide = Annotated[str, Among((VISION, BUNDLE))]
Dim = Size | str
# In image_numbers and key_images: a feature of no picture (a tile that only fills up), and no feature at all.
PADDING, NO_ENTRY = -1, -2
# In seen_images, of a token that sees no picture.
SEES_NOTHING = (-1, 2**31 - 1)


def kept_count(tokens: int, removed: float) -> int:
    """Number of visual tokens that stay when the share ``removed`` (0 <= removed < 1) of ``tokens`` goes.

    ``round(tokens * (1 - removed))``, halves to even, as in FastV's published code (METHODS: ``round(L * (1 - R))``).
    """
    return round(tokens * (1 - removed))


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: name, dtype and shape (numbers are fixed, names are symbolic)."""

    name: str
    dtype: Dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file and its boundary."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def most_features(features: int, share: float) -> int:
    """Image features, or visual tokens, that enter caches bounded by ``share``: rounded down, so that parts fit too."""
    return int(features * share + 1e-9)


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches always hold the same entries.

    Attributes:
        removed: share of visual tokens that is gone before the first layer of the group.
        source: what adds an entry: TOKENS (self-attention) or IMAGES (cross-attention to image features).
        most: of a group filled by images, or one that chooses, the share of a step's features or visual tokens that it
            takes at most; how many it takes may depend on the data, and the graph returns it.
        chooses: whether its one layer chooses by itself which of a step's visual tokens it keeps.
        sparse: layers that attend, in a step of one token, to ``attends`` entries of each key head alone.
        window: last entries that a later token may see; 0: all. What is before them goes where a step needs the room:
            the graph ``shift`` moves them to the front.
    """

    layers: tuple[Size, ...]
    capacity: Count
    kv_heads: Count
    head_size: Count
    removed: Share = 0.0
    source: Source = TOKENS
    most: Share = 1.0
    chooses: bool = False
    sparse: tuple[Size, ...] = ()
    attends: Size = 0
    window: Size = 0

    @property
    def shift(self) -> str:
        """Name of the graph that moves the window of one of its layers; one for every shape of caches."""
        return f"{SHIFT}-{self.kv_heads}-{self.capacity}-{self.head_size}"

    def length(self, tokens: int, visual: int) -> int:
        """Cache entries that a step adds to this group (at most, where it is bounded).

        Args:
            tokens: of the step; visual tokens are among them where the decoder has no cross-attention.
            visual: visual tokens, or image features, of the step.
        """
        if self.source == IMAGES:
            return most_features(visual, self.most)
        kept = most_features(visual, self.most) if self.chooses else kept_count(visual, self.removed)
        return tokens - visual + kept

    def nbytes(self, batch: int, dtype: str) -> int:
        """Bytes of all key and value caches of the group."""
        return 2 * len(self.layers) * batch * self.kv_heads * self.capacity * self.head_size * DTYPE_BYTES[dtype]

    def read_bytes(self, entries: int, dtype: str) -> int:
        """Bytes of the caches of one row that a step of one token reads behind so many entries."""
        left_out = dataclasses.replace(self, layers=self.sparse, capacity=max(0, entries - self.attends))
        return dataclasses.replace(self, capacity=entries).nbytes(1, dtype) - left_out.nbytes(1, dtype)


@dataclass(frozen=True)
class Contract:
    """Everything a runtime needs to drive the bundle's graphs.

    Attributes:
        family: model family, e.g. ``llava``.
        dtype: dtype of weights, embeddings, caches and logits.
        graphs: ``vision``, ``embed`` and ``decoder`` by name, and the pieces of a chain where there is one.
        chains: name of a graph -> names of graphs that do the same one after the other, for libraries that cannot take
            it in one piece; what a piece returns under a name, a later one takes under that name.
        groups: cache groups in the order of their first layers.
        dims: inclusive (minimum, maximum) of every symbolic input dimension.
        selection: method name and its parameters, or None for the unpruned model. For people and reports only.
        max_seq_len: tokens of a whole conversation before removal, the capacity of unpruned caches that hold all.
        images_assumed: images that a conversation of ``max_seq_len`` tokens is assumed to hold; sizes the later caches.
        image_tokens: visual tokens one image becomes, at most.
        image_grid: rows and columns in which they lie on the image, in reading order; None where they do not.
        image_token_id: token id that marks a visual token in the prompt.
        video_token_id: the mark of a video in a prompt's template, where the family takes videos.
        eos_token_ids: tokens that end an answer.
        macs: what the decoder computes; None where it is not known.
        guide: who provides the decoder's guide_scores; None where it takes none.
        packed: matrices in fewer bits, by part, format and block.
        cache: what stays in the caches after a step that brought visual tokens; None for all of it.
    """

    family: str
    dtype: FloatDtype
    graphs: Mapping[str, GraphSpec]
    groups: tuple[CacheGroup, ...]
    dims: Mapping[str, tuple[Size, Size]]
    selection: Mapping[str, Any] | None
    max_seq_len: Count
    images_assumed: Count
    image_tokens: Count
    image_token_id: Size
    eos_token_ids: tuple[Size, ...]
    image_grid: tuple[Count, Count] | None = None
    video_token_id: Size | None = None
    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    macs: Macs | None = None
    guide: Guide | None = None
    packed: tuple[Packed, ...] = ()
    cache: CachePolicy | None = None
    schema: Size = SCHEMA
    producer: str = field(default="vlmtrim")

    @property
    def wholes(self) -> tuple[str, ...]:
        """Names of all graphs that are no pieces of another."""
        shifts = dict.fromkeys(group.shift for group in self.groups if group.window)
        return ("vision", "embed", "decoder", *(() if self.cache is None else self.cache.graphs), *shifts)

    def chain(self, graph: str) -> tuple[str, ...]:
        """Names of the graphs to run one after the other in place of ``graph``; itself where it is not cut."""
        return self.chains.get(graph, (graph,))

    @property
    def removed(self) -> float:
        """Share of visual tokens removed before the last layer."""
        return self.groups[-1].removed

    @property
    def whole_grid(self) -> tuple[int, int] | None:
        """Rows and columns where they are all of a picture's visual tokens; None where pictures differ."""
        grid = self.image_grid
        return grid if grid is not None and grid[0] * grid[1] == self.image_tokens else None

    @property
    def removes(self) -> bool:
        """Whether a cache may hold less than all visual tokens, or image features."""
        return any(group.removed > 0 or group.most < 1 or group.chooses for group in self.groups)

    @property
    def crosses(self) -> bool:
        """Whether pictures reach the decoder through cross-attention instead of as tokens of the sequence."""
        return any(group.source == IMAGES for group in self.groups)

    @property
    def feature_width(self) -> int:
        """Numbers of a visual token, D, and with what layers add behind it, (1 + n) D."""
        named = {tensor.name: tensor.shape[-1] for tensor in self.graphs["decoder"].inputs if tensor.shape}
        return sum(int(named[name]) for name in ("inputs_embeds", DEEPSTACK) if name in named)

    def dense_capacity(self, group: CacheGroup) -> int:
        """Capacity of a group's caches in the unpruned model."""
        return self.images_assumed * self.image_tokens if group.source == IMAGES else self.max_seq_len

    @property
    def max_images(self) -> int:
        """Images that fit into one step."""
        return self.dims["N"][1] // self.image_tokens

    def prefill_macs(self, tokens: int, visual: int) -> int | None:
        """Multiply-adds of a prefill from empty caches; None where not known.

        Args:
            tokens: of the prompt; visual tokens are among them where the decoder has no cross-attention.
            visual: visual tokens, or image features: all in the first cross-attention layer, in the others what the
                caches take at most.
        """
        if self.macs is None:
            return None
        own = [group for group in self.groups if group.source == TOKENS and not group.chooses]
        total = self.macs.prefill((len(group.layers), group.length(tokens, visual)) for group in own)
        width = self.graphs["decoder"].inputs[0].shape[2]
        assert isinstance(width, int)
        for group in self.groups:
            if group.chooses:
                total += self.macs.choosing(tokens, group.length(tokens, visual), width)
            if group.source == IMAGES:
                later = (len(group.layers) - 1) * self.macs.crossing(tokens, group.length(tokens, visual))
                total += self.macs.crossing(tokens, visual) + later
        last = max(self.groups, key=lambda group: max(group.layers))
        keys = last.length(tokens, visual)
        if last.chooses:
            return total - self.macs.choosing(tokens, keys, width) + self.macs.choosing_last(tokens, keys)
        return total - self.macs.spared(keys if last.source == TOKENS else tokens, keys)

    def step_bytes(self, entries: Sequence[int]) -> int | None:
        """Bytes that a decode step of one row must read: the decoder's matrices as they are stored, and of the filled
        part of its caches what is attended to.

        Args:
            entries: filled cache entries of each group.
        """
        if self.macs is None:
            return None
        weights = self.macs.logits
        for group in self.groups:  # a step without pictures computes no keys of theirs
            weights += len(group.layers) * (self.macs.token - (self.macs.written if group.source == IMAGES else 0))
        size = DTYPE_BYTES[self.dtype]
        spared = sum(kind.weights * size - kind.nbytes for kind in self.packed if kind.part != TOWER)
        return weights * size - spared + self.entry_bytes(entries, read=True)

    def entry_bytes(self, entries: Sequence[int], read: bool = False) -> int:
        """Bytes of one row's filled cache entries, ``entries`` of each group; ``read``: of those that a step reads."""
        return sum(
            group.read_bytes(length, self.dtype)
            if read
            else dataclasses.replace(group, capacity=length).nbytes(1, self.dtype)
            for group, length in zip(self.groups, entries, strict=True)
        )

    def to_json(self) -> str:
        """Serialise; the inverse of :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "contract.json") -> Contract:
        """Parse ``contract.json``; its parts are not held against each other yet (:mod:`vlmtrim.graphs.agreement`).

        Raises BundleError where the text is not a contract of a known schema; ``where`` names it.
        """
        raw = json_object(text, where)
        if raw.get("schema") != SCHEMA:
            raise BundleError(
                f"{where} has schema {shown(raw.get('schema'))}, this vlmtrim reads schema {SCHEMA}: "
                f"export the model again ({_command(raw.get('selection'))}, MODEL as job.json names it), or install "
                "the vlmtrim that made the bundle"
            )
        return decode(Contract, raw, where)


def _command(selection: Any) -> str:
    """How a bundle with this selection is exported, as far as it can be told."""
    if not isinstance(selection, dict):
        return "export-vlm --model MODEL --method none" if selection is None else "export-vlm --model MODEL"
    words = [f"--{name} {value}" for name, value in selection.items() if isinstance(value, int | float | str)]
    return " ".join(["export-vlm --model MODEL", *(word for word in words if _PLAIN(word))])


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(input, output) names of the key cache and of the value cache of a layer."""
    key, value = ((f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}") for kind in ("key", "value"))
    return key, value
