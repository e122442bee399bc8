"""Draws which visual tokens survived: kept patches bright, removed ones dimmed, and their scores as heat beside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmtrim.graphs.contract import Contract
from vlmtrim.runtime.errors import RuntimeRefusal
from vlmtrim.runtime.processors.base import View
from vlmtrim.runtime.results import Prefill

PANEL = 480  # pixels, at least, of a drawn picture's height
GAP = 12
CAPTION = 28
WIDEST = 4096  # pixels of a drawn picture, where it is so long that PANEL would need more
PROBE = 1 << 20  # bytes, about those of a drawing: a place that takes them has room for one
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
DIMMED = 0.22  # of its brightness
# From low to high score: a dark-to-light ramp that also reads in grey and for colour-blind eyes.
HEAT = np.array([(13, 8, 70), (110, 20, 135), (190, 55, 100), (245, 125, 35), (252, 240, 120)], np.float64)


def check_target(path: str | Path, contract: Contract, pictures: int) -> None:
    """Raise RuntimeRefusal now if a drawing could not be made or written later; a file is written, and removed."""
    target = Path(path)
    if contract.image_grid is None:
        method = "" if contract.selection is None else f", method {contract.selection.get('method')}"
        raise RuntimeRefusal(
            "--show-kept draws pictures whose tokens lie on a fixed grid; those of this bundle (family "
            f"{contract.family}{method}) do not: leave it out, --json tells how many were kept"
        )
    if not pictures:
        raise RuntimeRefusal("--show-kept draws the prompt's pictures; give at least one --image")
    if target.suffix.lower() not in FORMATS:
        raise RuntimeRefusal(f"--show-kept cannot write {target.name}; give a file name that ends in .png")
    try:
        if not target.parent.is_dir():
            raise RuntimeRefusal(f"--show-kept: there is no folder {target.parent}; make it first")
        if target.exists() and not target.is_file():
            raise RuntimeRefusal(f"--show-kept: {target} is no file; give the name of one")
    except OSError as error:
        raise _unwritable(target, error) from error
    with _beside(target) as stream:
        stream.write(bytes(PROBE))


def save_drawing(drawing: Image.Image, path: str | Path) -> None:
    """Write a drawing whole or not at all. Raises RuntimeRefusal where it cannot be written."""
    target = Path(path)
    with _beside(target, keep=True) as stream:
        drawing.save(stream, format=FORMATS[target.suffix.lower()])


@contextmanager
def _beside(target: Path, keep: bool = False) -> Iterator[BinaryIO]:
    """A new file beside ``target``, which it becomes where it is to be kept; else, and in case of an error, it goes."""
    target = Path(os.path.realpath(target))  # through a link, as writing would
    partial = target.with_name(f".{target.name[:200]}.partial-{os.getpid()}")
    try:
        try:
            with open(partial, "xb") as stream:
                yield stream
            if keep:
                os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a drawing larger than the format can hold
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: Exception) -> RuntimeRefusal:
    why = error.strerror if isinstance(error, OSError) and error.strerror else "it is too large for its format"
    return RuntimeRefusal(f"--show-kept cannot write {target} ({why}); give another place, or a name that ends in .png")


def draw_kept(views: Sequence[View], prefill: Prefill, row: int = 0) -> Image.Image:
    """One drawing of a prompt's pictures, below each other; right of each its scores, where the prefill has any.

    Where layers choose by themselves, a patch is as bright as the share of the layers that keep it; where a policy cuts
    the caches, as the share of the layers' caches that hold it.

    Args:
        views: what the model saw (``Processor.views``), in order.
        prefill: of the step that brought the pictures.
        row: of the batch.
    """
    kept = shares_kept(prefill, row)
    scores = None if prefill.visual_scores is None else prefill.visual_scores[row]
    strips = [
        _strip(view.image.convert("RGB"), kept[view.tokens], None if scores is None else scores[view.tokens])
        for view in views
    ]
    drawing = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        drawing.paste(strip, (0, top))
        top += strip.height
    return drawing


def shares_kept(prefill: Prefill, row: int) -> np.ndarray:
    """Share of the layers that keep each of a row's visual tokens, or whose caches hold it, [N] from 0 to 1; bool where
    the layers agree."""
    if prefill.held is not None:  # of the layers, and of their key heads
        return prefill.layers_that_hold(row).mean(axis=0)
    if prefill.kept_by_layer is not None:
        return prefill.layers_that_keep(row).mean(axis=0)
    return prefill.survivors(row)


def _strip(picture: Image.Image, kept: np.ndarray, scores: np.ndarray | None) -> Image.Image:
    factor = max(1, min(-(-PANEL // picture.height), WIDEST // picture.width))
    size = (picture.width * factor, picture.height * factor)
    pixels = np.asarray(picture.resize(size, Image.Resampling.NEAREST), np.float64)
    light = DIMMED + (1.0 - DIMMED) * kept
    each = "" if kept.dtype == bool else " in a layer, on average"
    caption = f"{kept.sum():.4g} of {kept.size} visual tokens kept{each}"
    panels = [(pixels * _spread(light, size)[..., None], caption)]
    if scores is not None:
        grey = pixels.mean(-1, keepdims=True)
        heat = 0.7 * _spread(_heat(scores), size) + 0.3 * grey
        panels.append((heat, f"score, {scores.min():.2g} (dark) to {scores.max():.2g}"))
    strip = Image.new("RGB", (len(panels) * (size[0] + GAP) + GAP, size[1] + CAPTION + GAP), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(16)
    for index, (panel, caption) in enumerate(panels):
        left = GAP + index * (size[0] + GAP)
        strip.paste(Image.fromarray(panel.clip(0, 255).astype(np.uint8)), (left, GAP))
        draw.text((left, GAP + size[1] + 5), caption, fill="black", font=font)
    return strip


def _heat(scores: np.ndarray) -> np.ndarray:
    """[rows, columns] -> colours; the root shows differences among the many low scores of a softmax."""
    low, high = float(scores.min()), float(scores.max())
    level = np.sqrt((scores.astype(np.float64) - low) / max(high - low, 1e-30)) * (len(HEAT) - 1)
    below = np.minimum(level.astype(int), len(HEAT) - 2)
    share = (level - below)[..., None]
    return HEAT[below] * (1 - share) + HEAT[below + 1] * share


def _spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values of patches -> values of pixels."""
    rows = np.arange(size[1]) * values.shape[0] // size[1]
    columns = np.arange(size[0]) * values.shape[1] // size[0]
    return values[rows][:, columns]
