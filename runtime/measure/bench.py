"""Times, rates and memory of bundles, measured side by side in one run.

Definitions
    vision, embed, prefill   one run of the graph (``prefill`` is the decoder's), between two marks of the backend
    caches                   what cutting the caches takes, where the bundle has a policy; part of the TTFT
    decode                   embedding and decoder of one step, between marks; prefill and decode of one conversation
    TTFT                     host clock, from token ids and pixel values on the host to the first token id there
    TPOT                     host clock, from the first token id to the last, over the tokens in between
    bytes of a step          every weight of the decoder's matrices once, and the filled part of every cache;
                             activations, norms and the embedding's one row are left out (well below one percent)
    bandwidth                bytes of a step over the decode time: what the kernels achieve, whatever the host adds

Tokens are greedy and no end token stops them, so every round does the same work.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.backends.base import Tensor
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.guided import drawn_scores
from vlmtrim.runtime.measure import machine
from vlmtrim.runtime.measure.machine import Peak
from vlmtrim.runtime.measure.watch import Run, watch
from vlmtrim.runtime.prompt import Conversation
from vlmtrim.runtime.select_backend import ACTIVATIONS, choose_backend
from vlmtrim.runtime.session import Session


@dataclass(frozen=True)
class Work:
    """What every round does.

    Attributes:
        prompt, images: of the question.
        prompt_tokens: fill the prompt up to this length with its own words; None leaves it as it is.
        new_tokens: to generate, the first one included.
        rounds, warmup: rounds that count, and rounds before them that do not.
        cuda_graphs: how TensorRT's decode steps are replayed.
        activations: what ONNX Runtime multiplies packed weights by.
        cache_share: what cache policies leave of the visual tokens; None for each bundle's own.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    prompt_tokens: int | None
    new_tokens: int
    rounds: int
    warmup: int
    cuda_graphs: str = "auto"
    activations: str = ACTIVATIONS[0]
    cache_share: float | None = None


@dataclass(frozen=True)
class Sample:
    """Seconds of one conversation; ``decode`` per step, ``step_bytes`` what each of them must read (None: unknown);
    ``entry_bytes`` what the caches hold in the end."""

    vision: float
    embed: float
    prefill: float
    decode: list[float]
    ttft: float
    tpot: float
    caches: float
    entry_bytes: int
    step_bytes: list[int] | None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of decoding, median over the steps."""
        if self.step_bytes is None:
            return None
        return statistics.median(size / spent for size, spent in zip(self.step_bytes, self.decode, strict=True))

    def metrics(self) -> dict[str, float | None]:
        """One number each."""
        return {
            "vision": self.vision,
            "embed": self.embed,
            "prefill": self.prefill,
            "decode": statistics.median(self.decode),
            "ttft": self.ttft,
            "tpot": self.tpot,
            "caches": self.caches or None,
            "bandwidth": self.bandwidth,
        }


class Subject:
    """A bundle under the clock."""

    def __init__(self, folder: str | Path, backend: str, work: Work):
        self.bundle = open_bundle(folder)
        self.contract: Contract = self.bundle.contract
        self.name = Path(folder).resolve().name
        self.backend = choose_backend(backend, self.bundle, cuda_graphs=work.cuda_graphs, activations=work.activations)
        self._spans: list[tuple[str, Any, Any]] = []
        self.session = Session(self.bundle, watch(self.backend, self._clock))
        if work.cache_share is not None and self.session.caching:
            self.session.caching.share = work.cache_share
        self._work = work
        self._pictures = self.session.processor(work.images) if work.images else None
        tokens, words = ((), ()) if self._pictures is None else (self._pictures.tokens, self._pictures.words)
        if max(work.prompt_tokens or 0, work.new_tokens) > self.contract.max_seq_len:  # before anything is filled up
            raise RuntimeRefusal(
                f"--prompt-tokens {work.prompt_tokens} and --new-tokens {work.new_tokens} do not fit into {folder}, "
                f"which holds {self.contract.max_seq_len}; give fewer, or export with a larger --max-seq-len"
            )
        self.visual = self.kept = 0  # visual tokens, or image features, as the last prefill had them
        asked = Conversation(self.session.prompter).ask(work.prompt, len(work.images), words=words)
        asked = self.session.prompter.expand_images(asked, tokens, words)
        self.ids = fill(asked, work.prompt_tokens, self.contract)
        needed = len(self.ids) + work.new_tokens
        if needed > self.contract.max_seq_len:
            raise RuntimeRefusal(
                f"{len(self.ids)} prompt tokens and {work.new_tokens} new ones do not fit into {folder}, which holds "
                f"{self.contract.max_seq_len}; give fewer, or export with a larger --max-seq-len"
            )
        self.samples: list[Sample] = []

    @property
    def pruned(self) -> bool:
        """Whether visual tokens, or image features, are removed, before or after they are cached."""
        return self.contract.removes or bool(self.session.caching)

    def run(self) -> Sample:
        """One conversation."""
        session = self.session
        session.reset()
        self._spans.clear()
        start = time.perf_counter()
        prefill = session.prefill([self.ids], self._pictures, drawn_scores(self.contract, [self.ids]))
        token = prefill.logits.argmax(axis=1)
        first = time.perf_counter()
        self.visual, self.kept = prefill.visual, prefill.kept
        ends, entries = [len(self._spans)], []
        for _ in range(self._work.new_tokens - 1):
            token = session.decode(token).argmax(axis=1)
            ends.append(len(self._spans))
            entries.append([int(length.max()) for length in session.lengths.entries])
        end = time.perf_counter()
        seconds = [(name, self.backend.elapsed(a, b)) for name, a, b in self._spans]
        before = dict(seconds[: ends[0]])
        sizes = [size for size in map(self.contract.step_bytes, entries) if size is not None]
        return Sample(
            vision=before.get("vision", 0.0),
            embed=before["embed"],
            prefill=before["decoder"],
            decode=[sum(spent for _, spent in seconds[a:b]) for a, b in itertools.pairwise(ends)],
            ttft=first - start,
            tpot=(end - first) / len(entries),
            caches=session.times.caches,
            entry_bytes=self.contract.entry_bytes([int(length.max()) for length in session.lengths.entries]),
            step_bytes=sizes or None,
        )

    def _clock(self, graph: str, feeds: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
        start = self.backend.mark()
        outputs = run(feeds)
        self._spans.append((graph, start, self.backend.mark()))
        return outputs


def fill(ids: list[int], length: int | None, contract: Contract) -> list[int]:
    """A prompt of exactly ``length`` tokens: its own text repeated behind the first token. Raises RuntimeRefusal."""
    if length is None or length == len(ids):
        return ids
    if length < len(ids):
        raise RuntimeRefusal(f"--prompt-tokens is {length}, the prompt has {len(ids)} already; give {len(ids)} or more")
    words = [token for token in ids[1:] if token != contract.image_token_id] or ids[:1]
    missing = length - len(ids)
    return [*ids[:1], *(words * (missing // len(words) + 1))[:missing], *ids[1:]]


def measure(folders: Sequence[str | Path], backend: str, work: Work, peak: Peak | None = None) -> dict[str, Any]:
    """Run the rounds, every bundle once a round, each round in another order; returns the whole record.

    Args:
        peak: of the device, where the table does not know it.

    Raises:
        BundleError, RuntimeRefusal: a bundle is damaged, does not run here, or does not hold the prompt.
    """
    if work.new_tokens < 2 or work.rounds < 1 or work.warmup < 0:
        raise RuntimeRefusal("give --new-tokens 2 or more, --repeat 1 or more and --warmup 0 or more")
    subjects = [Subject(folder, backend, work) for folder in folders]
    for turn in range(work.warmup + work.rounds):
        first = turn % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            sample = subject.run()
            if turn >= work.warmup:
                subject.samples.append(sample)
        print(f"round {turn + 1} of {work.warmup + work.rounds}", file=sys.stderr, flush=True)
    gpu = machine.gpu() if any(subject.backend.name != "ort-cpu" for subject in subjects) else None
    dense = next((subject for subject in subjects if not subject.pruned), None)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cuda_graphs": work.cuda_graphs,
        "activations": work.activations,
        "backend": "/".join(dict.fromkeys(subject.backend.name for subject in subjects)),
        "device": machine.cpu() if gpu is None else gpu.name,
        "driver": None if gpu is None else gpu.driver,
        "versions": machine.versions(),
        "new_tokens": work.new_tokens,
        "rounds": work.rounds,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_memory_used": None if gpu is None else gpu.used,
        "bundles": [record(subject, dense, known_peak(peak, gpu, subject.contract.dtype)) for subject in subjects],
    }


def known_peak(given: Peak | None, gpu: machine.Gpu | None, dtype: str) -> Peak:
    """What the user says, else what the table says; its operations are those of 16 bits."""
    given, table = given or Peak(None, None), Peak(None, None) if gpu is None else gpu.peak
    flops = None if dtype == "float32" else table.flops
    return Peak(given.bandwidth or table.bandwidth, given.flops or flops)


def record(subject: Subject, dense: Subject | None, peak: Peak) -> dict[str, Any]:
    """All that is known of one bundle after the rounds."""
    contract, tokens = subject.contract, len(subject.ids)
    metrics = summary([sample.metrics() for sample in subject.samples])
    macs = contract.prefill_macs(tokens, subject.visual)
    bandwidth = metrics["bandwidth"]
    out: dict[str, Any] = {
        "name": subject.name,
        "digest": subject.bundle.digest,
        "dtype": contract.dtype,
        "selection": None if contract.selection is None else dict(contract.selection),
        "tokens": tokens,
        "visual": subject.visual,
        "kept": subject.kept,
        "metrics": metrics,
        "tokens_per_second": 1 / metrics["tpot"]["median"],
        "prefill_macs": macs,
        "peak": asdict(peak),
        "share_of_bandwidth": share(bandwidth and bandwidth["median"], peak.bandwidth),
        "share_of_flops": share(macs and 2 * macs / metrics["prefill"]["median"], peak.flops),
        "memory": memory(subject),
        "samples": [asdict(sample) for sample in subject.samples],
    }
    if dense is not None and subject.pruned and dense.ids == subject.ids:
        out["against"] = {"name": dense.name, **ratios(subject, dense)}
    return out


def share(value: float | None, most: float | None) -> float | None:
    """``value`` over ``most``; None where either is unknown."""
    return None if value is None or most is None else value / most


def summary(samples: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Median, smallest and largest of every metric; None where it is unknown."""
    out: dict[str, Any] = {}
    for name in samples[0]:
        values = [value for sample in samples if (value := sample[name]) is not None]
        out[name] = (
            None if not values else {"median": statistics.median(values), "min": min(values), "max": max(values)}
        )
    return out


def ratios(subject: Subject, dense: Subject) -> dict[str, Any]:
    """How many times faster than the unpruned bundle: medians of the rounds' own ratios, and what is predicted."""
    pairs = list(zip(dense.samples, subject.samples, strict=True))
    out: dict[str, Any] = {}
    for name in ("prefill", "ttft", "decode", "tpot"):
        found = [a.metrics()[name] / b.metrics()[name] for a, b in pairs]  # type: ignore[operator]
        out[name] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    tokens = len(subject.ids)
    before, after = (s.contract.prefill_macs(tokens, s.visual) for s in (dense, subject))
    out["prefill_by_flops"] = share(before, after)
    reads = [s.samples[0].step_bytes for s in (dense, subject)]
    read_before, read_after = (None if step is None else float(sum(step)) for step in reads)
    out["decode_by_bytes"] = share(read_before, read_after)
    return out


def memory(subject: Subject) -> dict[str, Any]:
    """Bytes: caches of every group as the contract has them, what the backend holds, weights in the files."""
    contract, session = subject.contract, subject.session
    groups = [
        {
            "layers": [g.layers[0], g.layers[-1]],
            "capacity": g.capacity,
            "bytes": g.nbytes(session.batch, contract.dtype),
        }
        for g in contract.groups
    ]
    held = subject.backend.memory()
    predicted = sum(group["bytes"] for group in groups)
    return {
        "groups": groups,
        "caches_by_contract": predicted,
        "entries": subject.samples[-1].entry_bytes,
        "backend": held,
        "caches_as_predicted": held["caches"] == predicted if "caches" in held else None,
        "weight_files": sum(path.stat().st_size for path in subject.bundle.folder.glob("*.safetensors")),
        "engine_files": sum(path.stat().st_size for path in subject.bundle.folder.glob("*.engine")),
    }
