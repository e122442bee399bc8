"""What an export was asked to do, as one typed value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from vlmtrim.graphs.formats import is_calibrated
from vlmtrim.graphs.methods.fastv import FastV

DTYPES = ("auto", "float32", "float16", "bfloat16")
ENGINES = ("none", "tensorrt-rtx", "tensorrt")
FLOAT, AUTO = "float", "auto"  # of weights: as they come; of the logits' matrix: by the format of the others


class Refusal(Exception):
    """Something the user asked for cannot be done; the message is one sentence for the user, never a stack trace."""


@dataclass(frozen=True)
class Job:
    """One run of export-vlm.

    Attributes:
        model: preset, ``tiny:<family>``, checkpoint folder or hub id.
        method: of ``vlmtrim.graphs.methods``, with its parameters; None for the unpruned model.
        dtype: of weights and activations; ``auto`` keeps the checkpoint's.
        max_seq_len: tokens of a whole conversation before removal.
        max_input_len: tokens of one step at most; None for ``max_seq_len``. Less makes caches of layers with a window
            as long as the window and a step.
        max_batch: rows that run at once.
        images: images that a conversation of full length is assumed to hold; the later caches are sized for it.
        image_tokens: visual tokens of one picture at most, for families that take pictures of any size; 0 leaves half
            of the sequence to text.
        output: bundle folder.
        engine: engines to build besides the ONNX files.
        engine_shards: engines that the decoder is cut into; 0 for as few as memory allows.
        link_weights: hard-link the checkpoint's files instead of cloning or copying them.
        clip_overflow: a value that does not fit the dtype becomes its largest instead of ending the export.
        max_memory: gigabytes (1e9 bytes) that the job may take; None for what is free.
        force: replace an existing bundle.
        eos_token_ids: tokens that end an answer; none for those that the checkpoint names.
        emit_guide: let the decoder also return its attention to the caches, for a bundle that is guided by it.
        weights: format of :mod:`vlmtrim.graphs.formats` that the decoder's matrices are stored in; FLOAT for ``dtype``.
        block: weights of a column that share a scale; 0 for all, None for the format's own.
        head_weights: the same of the matrix of the logits; AUTO for 8 bits where ``weights`` packs at all.
        vision_weights: the same of the vision tower's matrices.
        keep: patterns of parameters that are not packed.
        fp32_layers: decoder layers that compute in float32 where the others compute in float16.
        cache: of ``vlmtrim.graphs.caches``, what stays in the caches behind a step with pictures; None for all of it.
        cache_share: of the candidates, that stays unless run-vlm says another.
        calibrate: folder of pictures with questions that bounds are measured, and integers rounded, on; None for none.
        decoder: ONNX file of a decoder that another exporter wrote, to take instead of tracing one; None for none.
        vision: the same of a vision graph.
        embedding: the same of a token embedding.
    """

    model: str
    output: str
    method: Any = field(default_factory=FastV)
    dtype: str = "auto"
    max_seq_len: int = 2048
    max_input_len: int | None = None
    max_batch: int = 1
    images: int = 1
    image_tokens: int = 0
    engine: str = "none"
    engine_shards: int = 0
    link_weights: bool = False
    clip_overflow: bool = False
    max_memory: float | None = None
    force: bool = False
    eos_token_ids: tuple[int, ...] = ()
    emit_guide: bool = False
    weights: str = FLOAT
    block: int | None = None
    head_weights: str = AUTO
    vision_weights: str = FLOAT
    keep: tuple[str, ...] = ()
    fp32_layers: tuple[int, ...] = ()
    cache: Any = None
    cache_share: float = 0.5
    calibrate: str | None = None
    decoder: str | None = None
    vision: str | None = None
    embedding: str | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Graphs of the bundle that come from files of other exporters."""
        files = {"vision": self.vision, "embed": self.embedding, "decoder": self.decoder}
        return tuple(name for name, file in files.items() if file is not None)

    @property
    def longest_step(self) -> int:
        """Tokens that a step may have."""
        return self.max_seq_len if self.max_input_len is None else self.max_input_len

    @property
    def head_format(self) -> str:
        """Format of the matrix of the logits. Its errors are errors of the answer, so AUTO gives it 8 bits."""
        if self.head_weights != AUTO:
            return self.head_weights
        return {FLOAT: FLOAT, "int4": "int8", "int8": "int8", "w8a8": "w8a8"}.get(self.weights, "fp8")

    @property
    def calibrates_weights(self) -> bool:
        """Whether the decoder's matrices are packed on what the pictures of ``calibrate`` make of their inputs."""
        return self.calibrate is not None and self.weights != FLOAT and is_calibrated(self.weights)

    @property
    def checks_ranges(self) -> bool:
        """Whether the pictures of ``calibrate`` tell which layers leave float16's range."""
        return self.calibrate is not None and self.dtype == "float16"

    @property
    def packs(self) -> bool:
        """Whether any weights are stored in fewer bits."""
        return {self.weights, self.head_format, self.vision_weights} != {FLOAT}

    def fields(self) -> dict[str, Any]:
        """Name -> value, for ``job.json`` and for printing; the method's parameters beside its name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        method, cache = values.pop("method"), values["cache"]
        values["cache"] = None if cache is None else cache.describe()
        chosen = {"method": "none"} if method is None else {"method": method.name, **dataclasses.asdict(method)}
        return {"model": values.pop("model"), "output": values.pop("output"), **chosen, **values}


def check_numbers(job: Job) -> None:
    """Raises Refusal for numbers that no model allows."""
    if job.engine_shards and job.engine == "none":
        raise Refusal("--engine-shards cuts engines and none is built; give --engine tensorrt-rtx or tensorrt as well")
    for name, least in (("max_batch", 1), ("images", 1), ("image_tokens", 0)):
        if (value := getattr(job, name)) < least:
            raise Refusal(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if not 0 <= job.cache_share <= 1:
        raise Refusal(f"--cache-share is {job.cache_share:g}; give the share of visual tokens that stays, 0 to 1")
    if job.max_memory is not None and not 0 < job.max_memory < math.inf:
        raise Refusal(f"--max-memory is {job.max_memory:g}; give a number of gigabytes above 0")
    for token in job.eos_token_ids:
        if token < 0:
            raise Refusal(f"--eos-token-id is {token}; give 0 or more")
