"""What every layer's attention asks for, measured on pictures with questions: bounds for methods that take them.

A folder for ``--calibrate`` holds pictures; the text file of a picture's name, where there is one, is its question.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmtrim.export.job import FLOAT, Job, Refusal
from vlmtrim.graphs.keeping import CANDIDATE

FILE = "budgets.json"  # in the bundle; what --bound and --budgets read
SHARES = "cache_shares.json"  # the same; what --cache-table reads
QUESTION = "Describe the picture."
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def questions(folder: Path) -> list[tuple[Path, str]]:
    """(picture, question) of a folder, by name. Raises Refusal where it holds none, or a question is no text."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
        texts = [path.with_suffix(".txt") for path in files]
        asked = [text.read_text().strip() if text.is_file() else QUESTION for text in texts]
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--calibrate: {folder} cannot be read ({error}); give a folder of pictures") from error
    if not files:
        raise Refusal(f"--calibrate: {folder} holds no pictures ({', '.join(sorted(_PICTURES))}); give some")
    return list(zip(files, asked, strict=True))


def check(job: Job) -> None:
    """Raise Refusal where a job cannot be calibrated, before any work."""
    if job.calibrate is None:
        return
    questions(Path(job.calibrate))
    if measures_shares(job) and job.cache.table is not None:
        raise Refusal("--calibrate measures what --cache-table would give; leave one of them out")
    if not measures_bounds(job):
        name = "none" if job.method is None else job.method.name
        if not job.calibrates_weights and not job.checks_ranges and not measures_shares(job):
            raise Refusal(
                "--calibrate measures bounds of --method zipvl or shares of --cache prefixkv, rounds --weights int4 or "
                f"int8, or finds what leaves --dtype float16; the method is {name}, the weights are {job.weights}, the "
                f"dtype is {job.dtype}: leave it out"
            )
        return
    if job.method.budgets is not None or isinstance(job.method.bound, tuple):
        raise Refusal("--calibrate measures what --budgets or --bound FILE would give; leave one of them out")


def measures_bounds(job: Job) -> bool:
    """Whether a job's pictures are there for its method."""
    return job.calibrate is not None and hasattr(job.method, "calibrated")


def measures_shares(job: Job) -> bool:
    """Whether a job's pictures are there for its cache policy."""
    return job.calibrate is not None and hasattr(job.cache, "calibrated")


def measure(bundle: Path, asked: Sequence[tuple[Any, str]]) -> dict[str, Any]:
    """Mean and deviation over the pictures of the share of visual tokens that every layer keeps.

    Args:
        bundle: exported with the method's exact form, so that nothing is cut.
        asked: pictures, as :meth:`vlmtrim.runtime.Chat.generate` takes them, and their questions.
    """
    from vlmtrim import runtime

    shares = []
    with runtime.open(bundle) as chat:
        selection = dict(chat.session.contract.selection or {})
        for picture, question in asked:
            chat.reset()
            prefill = next(iter(chat.generate(question, [picture], max_new_tokens=1))).prefill
            shares.append(prefill.layers_that_keep(0).mean(axis=1))
    means, deviations = np.mean(shares, axis=0), np.std(shares, axis=0)
    layers = [{"mean": float(m), "deviation": float(d)} for m, d in zip(means, deviations, strict=True)]
    return {"selection": selection, "prompts": len(shares), "layers": layers}


def calibrate(job: Job, export: Any, scratch: Path) -> tuple[Job, str]:
    """The job with the bounds that its pictures ask for, and the file that says so.

    Args:
        export: what exports a job and returns its bundle.
        scratch: a folder for the exact form's bundle.
    """
    assert job.calibrate is not None and job.method is not None
    asked = questions(Path(job.calibrate))
    exact = dataclasses.replace(
        job, method=dataclasses.replace(job.method, bound=1.0), output=str(scratch / "exact"), engine="none",
        dtype="float32", force=False, calibrate=None,
    )  # fmt: skip
    found = measure(export(exact), asked)
    shares = [f"{layer['mean']:.2f} +- {layer['deviation']:.2f}" for layer in found["layers"]]
    print(f"calibrated on {len(asked)} pictures, kept by layer: {', '.join(shares)}", file=sys.stderr)
    bounds = [(layer["mean"], layer["deviation"]) for layer in found["layers"]]
    return dataclasses.replace(job, method=job.method.calibrated(bounds)), json.dumps(found, indent=1) + "\n"


def scores(bundle: Path, asked: Sequence[tuple[Any, str]]) -> list[np.ndarray]:
    """What the visual tokens of every prompt are ranked by in every layer of a bundle with a policy, [L, N] each."""
    from vlmtrim import runtime

    found = []
    with runtime.open(bundle) as chat:
        chat.session.caching.share = 1.0
        for picture, question in asked:
            chat.reset()
            next(iter(chat.generate(question, [picture], max_new_tokens=1)))
            assert chat.session.caching.judged is not None
            ranked, kinds = chat.session.caching.judged
            found.append(np.stack([one[0, 0, of[0] == CANDIDATE] for one, of in zip(ranked, kinds, strict=True)]))
    return found


def calibrate_shares(job: Job, export: Any, scratch: Path) -> tuple[Job, str]:
    """The job with the shares of its cache policy that its pictures ask for, and the file that says so.

    Arguments as :func:`calibrate`'s. Measured on the dense model, whose layers all hold every visual token.
    """
    assert job.calibrate is not None
    asked = questions(Path(job.calibrate))
    plain = dataclasses.replace(
        job, method=None, output=str(scratch / "plain"), engine="none", dtype="float32", force=False, calibrate=None,
        weights=FLOAT, vision_weights=FLOAT, block=None, keep=(), fp32_layers=(),
    )  # fmt: skip
    policy = job.cache.calibrated(scores(export(plain), asked))
    middle = ", ".join(f"{share:.2f}" for share in policy.table[len(policy.table) // 2])
    print(f"calibrated on {len(asked)} pictures, at a share of 0.5 the layers keep {middle}", file=sys.stderr)
    found = {"policy": policy.name, "prompts": len(asked), "shares": policy.table}
    return dataclasses.replace(job, cache=policy), json.dumps(found, indent=1) + "\n"
