"""The drawing of kept tokens: what is bright, what is dim, what is hot, and what cannot be drawn."""

import numpy as np
import pytest
from PIL import Image

from vlmtrim.graphs.bundle import open_bundle
from vlmtrim.runtime import cli
from vlmtrim.runtime.processors.base import View
from vlmtrim.runtime.results import Prefill
from vlmtrim.runtime.show import CAPTION, GAP, PANEL, draw_kept


def views(*pictures):
    """Each picture with its 2 x 3 visual tokens."""
    return [View(image, np.arange(6).reshape(2, 3) + 6 * index) for index, image in enumerate(pictures)]


def prefill(scores):
    """Two pictures of 6 visual tokens at 4..9 and 12..17; of the first 4, 6 and 9 survive, of the second 12 and 17."""
    kept = np.array([0, 1, 2, 3, 4, 6, 9, 10, 11, 12, 17, 18])
    positions = np.array([[*range(4, 10), *range(12, 18)]])
    return Prefill(np.zeros((1, 5)), 12, 5, [kept], positions, scores)


def patch(drawing, strip, row, column, panel=0):
    """Colour in the middle of a patch of pictures that are 90 x 60 (drawn 8 times as large)."""
    height = 8 * 60
    x = GAP + panel * (8 * 90 + GAP) + int((column + 0.5) * 8 * 30)
    y = strip * (height + CAPTION + GAP) + GAP + int((row + 0.5) * 8 * 30)
    return drawing.getpixel((x, y))


def test_kept_patches_are_bright_and_removed_ones_dim():
    pictures = [Image.new("RGB", (90, 60), colour) for colour in ((200, 100, 50), (0, 200, 0))]
    drawing = draw_kept(views(*pictures), prefill(None))
    bright = {(0, 0), (0, 2), (1, 2)}
    for row in range(2):
        for column in range(3):
            kept = (row, column) in bright
            assert patch(drawing, 0, row, column) == ((200, 100, 50) if kept else (44, 22, 11))
    assert patch(drawing, 1, 0, 0) == (0, 200, 0) == patch(drawing, 1, 1, 2)
    assert patch(drawing, 1, 0, 1) == (0, 44, 0)
    assert drawing.width == 2 * GAP + 8 * 90 and PANEL == 8 * 60  # no scores: no second panel


def test_the_highest_score_is_the_lightest():
    scores = np.linspace(0, 1, 12, dtype=np.float32)[None]
    drawing = draw_kept(views(*[Image.new("RGB", (90, 60))] * 2), prefill(scores))
    for strip in range(2):
        light = [sum(patch(drawing, strip, row, column, panel=1)) for row in range(2) for column in range(3)]
        assert light == sorted(light) and light[0] < light[-1] / 3


def test_equal_scores_are_drawn(tmp_path):
    draw_kept(views(*[Image.new("RGB", (90, 60))] * 2), prefill(np.zeros((1, 12), np.float32)))


def test_nothing_selected_is_all_bright():
    dense = Prefill(np.zeros((1, 5)), 6, 6, None, np.array([range(6)]), None)
    drawing = draw_kept(views(Image.new("RGB", (90, 60), (9, 9, 9))), dense)
    assert {patch(drawing, 0, row, column) for row in range(2) for column in range(3)} == {(9, 9, 9)}


def test_the_command_draws_what_its_prefill_kept(fastv_bundle, picture, tmp_path, capsys):
    target = tmp_path / "kept.png"
    argv = [str(fastv_bundle), "--image", str(picture), "--prompt", "Hi?", "--max-new-tokens", "2", "--show-kept"]
    assert cli.main([*argv, str(target)]) == 0
    with Image.open(target) as drawing:
        assert drawing.width > 2 * PANEL and drawing.height >= PANEL
    assert open_bundle(fastv_bundle).contract.image_grid == (4, 4)


@pytest.mark.parametrize(
    ("images", "target", "why"),
    [(0, "kept.png", "at least one --image"), (1, "kept.txt", "ends in .png"), (1, "no/such/kept.png", "no folder")],
)
def test_what_cannot_be_drawn_is_refused_before_the_answer(
    fastv_bundle, picture, tmp_path, capsys, images, target, why
):
    argv = [str(fastv_bundle), "--prompt", "Hi?", "--backend", "ort-cpu", "--show-kept", str(tmp_path / target)]
    argv += images * ["--image", str(picture)]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert why in captured.err and captured.out == "" and "\n" not in captured.err.strip()
