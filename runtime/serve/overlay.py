"""What a page needs to draw which visual tokens survived, on the pictures as the model saw them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmtrim.runtime.processors.base import Processor, View
from vlmtrim.runtime.results import Prefill
from vlmtrim.runtime.show import shares_kept

SIDE = 640  # pixels of a picture that is sent back, at most
QUALITY = 85


def views_of(processor: Processor, pictures: Sequence[Image.Image]) -> list[View]:
    """What to show of a request's pictures, small; nothing where the family's tokens lie on no fixed grid."""
    if processor.contract.image_grid is None or not pictures:
        return []
    views = []
    for view in processor.views(pictures):
        image = view.image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        views.append(View(image, view.tokens))
    return views


def overlay(views: Sequence[View], prefill: Prefill) -> dict[str, Any]:
    """Per picture as the model saw it: a JPEG, and for each of its ``rows`` x ``columns`` tokens in reading order the
    share of layers that keep it (1 or 0 where they agree) and the score that it was ranked by, or null.
    """
    kept = shares_kept(prefill, 0)
    scores = None if prefill.visual_scores is None else prefill.visual_scores[0].astype(np.float64)
    return {"pictures": [_picture(view, kept, scores) for view in views]}


def _picture(view: View, kept: np.ndarray, scores: np.ndarray | None) -> dict[str, Any]:
    file = io.BytesIO()
    view.image.save(file, "JPEG", quality=QUALITY)
    rows, columns = view.tokens.shape
    return {
        "image": "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(),
        "rows": rows,
        "columns": columns,
        "kept": [round(float(share), 3) for share in kept[view.tokens].ravel()],
        "scores": None if scores is None else [float(f"{score:.4g}") for score in scores[view.tokens].ravel()],
    }
