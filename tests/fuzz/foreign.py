"""Fuzzes trim-onnx, --decoder, --vision and --embedding: mutants are done, or refused by a sentence."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import foreign_decoders
import foreign_parts
import mutations
import onnx_ir as ir
from harness import Report, attempt

from vlmtrim.graphs import GraphError, load
from vlmtrim.graphs.foreign.cli import main
from vlmtrim.graphs.foreign.embedding import own_embedding
from vlmtrim.graphs.foreign.own_form import own_form
from vlmtrim.graphs.foreign.vision import own_vision
from vlmtrim.runtime.errors import RuntimeRefusal

_SCORES = ["last-row", "last-row", "no-rope", "dart", "divprune", "stride"]


def decoders(count: int, seed: int) -> Report:
    """Of every ten mutants one is changed in its bytes, the others in the fields of nodes, weights and boundary."""
    report, w = Report(), foreign_decoders.weights()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        originals = {}
        for form in foreign_decoders.FORMS:
            path = folder / f"{form}.onnx"
            ir.save(foreign_decoders.build(form, w), path, external_data="w.bin", size_threshold_bytes=4096)
            originals[form] = path.read_bytes()
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            form = draw.choice(foreign_decoders.FORMS)
            change = mutations.mutated_bytes if draw.random() < 0.1 else mutations.mutated_onnx
            mutant = folder / "mutant.onnx"
            mutant.write_bytes(change(originals[form], draw))
            k, score = draw.randrange(1, 4), draw.choice(_SCORES)
            name = f"{seed}/{number} {form} {change.__name__} k={k} {score}"
            attempt(name, partial(_trim, mutant, k, score), report)
            if number % 5 == 0:
                attempt(f"{name} own form", partial(_rewritten, mutant, _own_form), report)
    return report


def parts(count: int, seed: int) -> Report:
    """The same of vision and embedding graphs."""
    report, w = Report(), foreign_parts.weights()
    models = {f"vision {flat}": foreign_parts.vision(w, flat) for flat in (False, True)}
    models |= {form: foreign_parts.embedding(w, form) for form in foreign_parts.EMBEDDINGS}
    originals = {name: ir.serde.serialize_model(model).SerializeToString() for name, model in models.items()}
    with tempfile.TemporaryDirectory() as scratch:
        mutant = Path(scratch) / "mutant.onnx"
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            name = draw.choice(list(originals))
            change = mutations.mutated_bytes if draw.random() < 0.1 else mutations.mutated_onnx
            mutant.write_bytes(change(originals[name], draw))
            rewrite = _own_vision if name.startswith("vision") else _own_embedding
            attempt(f"{seed}/{number} {name} {change.__name__}", partial(_rewritten, mutant, rewrite), report)
    return report


def _own_form(model: ir.Model) -> None:
    """As export-vlm --decoder does."""
    own_form(model, 64)


def _own_vision(model: ir.Model) -> None:
    """As export-vlm --vision does."""
    own_vision(model, foreign_parts.VISION_SPEC)


def _own_embedding(model: ir.Model) -> None:
    """As export-vlm --embedding does."""
    own_embedding(model, foreign_parts.EMBED_SPEC, foreign_parts.VOCABULARY, foreign_parts.IMAGE)


def _rewritten(mutant: Path, rewrite: Callable[[ir.Model], None]) -> None:
    """Brings a mutant into the contract's form."""
    try:
        model = load(mutant)
    except ValueError as error:
        raise RuntimeRefusal("no ONNX") from error
    try:
        rewrite(model)
    except GraphError as error:
        raise RuntimeRefusal(str(error)) from error


def _trim(mutant: Path, k: int, score: str) -> None:
    """Runs trim-onnx; what it wrote must be an ONNX file again, and what it refuses leaves nothing behind."""
    target, said = mutant.with_name("trimmed.onnx"), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(mutant), str(target), "--k", str(k), "--score", score, "--force"])
    left = [path.name for path in mutant.parent.iterdir() if path.name.startswith(".")]
    assert not left, f"left behind: {left}"
    if status:
        raise RuntimeRefusal(said.getvalue().strip())
    load(target)
    target.unlink()
