"""Pictures whose content is known exactly: coloured shapes, and sometimes a digit or a word, on a background.

A `Scene` is plain data; `build` draws one at random, `render` paints it, `owners` tells which thing covers each patch.
Lengths are pixels of the final SIZE x SIZE picture, y grows downwards, channels are RGB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
PATCH = 8
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (222, 40, 40),
    "green": (35, 160, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 180),
    "orange": (245, 135, 30),
    "cyan": (50, 205, 215),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (22, 22, 22), "gray": (128, 128, 128), "tan": (205, 180, 145)}
TEXTURES = ("plain", "noise", "stripes", "gradient")
DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "map", "key", "bus", "fish", "tree", "go", "up", "milk", "ball")

MAX_SHAPES = 6
MAX_COUNT = 4  # largest number of shapes that a scene is built to repeat
SMALL, LARGE = (7.0, 8.5), (11.0, 13.5)  # ranges of radii
GAP = 2.0  # free pixels between any two things
OVERSAMPLE = 2  # shapes are painted this much larger and averaged down, for smooth edges
CANVAS = (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE)
COVERED = 12  # pixels of a patch's 64 that make it belong to a thing


@dataclass(frozen=True)
class Shape:
    """One coloured shape; it stays inside the circle of `radius` pixels around (x, y)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Writing:
    """A digit or a word whose ink lies in the box `width` x `height` pixels around (x, y)."""

    text: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    font_size: int
    bold: bool


@dataclass(frozen=True)
class Scene:
    """Everything that is in one picture.

    `repeated_kind` and `repeated_colour` name what the scene was built to hold an evenly drawn number of (0 included),
    so that questions that count them have balanced answers.
    """

    shapes: tuple[Shape, ...]
    writing: Writing | None
    background: str
    texture: str
    texture_seed: int
    repeated_kind: str
    repeated_colour: str


def build(rng: Generator) -> Scene:
    """Draws a scene: 1 to MAX_SHAPES shapes that touch neither each other, nor the writing, nor the border."""
    kind, colour = _pick(rng, KINDS), _pick(rng, COLOURS)
    kind_count, colour_count = rng.integers(0, MAX_COUNT + 1, size=2).tolist()
    total = int(rng.integers(max(kind_count, colour_count, 1), MAX_SHAPES + 1))
    kinds = _exactly(rng, kind, kind_count, total, KINDS)
    colours = _exactly(rng, colour, colour_count, total, tuple(COLOURS))
    background = _pick(rng, BACKGROUNDS)
    writing = _write(rng)
    return Scene(
        shapes=_place(rng, kinds, colours, writing),
        writing=writing,
        background=background,
        texture=_pick(rng, TEXTURES),
        texture_seed=int(rng.integers(2**31)),
        repeated_kind=kind,
        repeated_colour=colour,
    )


def things(scene: Scene) -> tuple[Shape | Writing, ...]:
    """The shapes, then the writing if there is one: the numbering of `owners`."""
    return (*scene.shapes, *([scene.writing] if scene.writing else []))


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, SIZE x SIZE."""
    canvas = Image.fromarray(_background(scene)).resize(CANVAS, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _paint(draw, shape, COLOURS[shape.colour])
    picture = canvas.reduce(OVERSAMPLE)
    if scene.writing is not None:
        writing = scene.writing
        ImageDraw.Draw(picture).text(
            (writing.x, writing.y),
            writing.text,
            fill=COLOURS[writing.colour],
            font=_font(writing.font_size),
            anchor="mm",
            stroke_width=int(writing.bold),
        )
    return picture


def owners(scene: Scene) -> np.ndarray:
    """Which thing covers each patch: int [SIZE/PATCH, SIZE/PATCH]; -1 nothing, i = shapes[i], len(shapes) = writing."""
    canvas = Image.new("L", CANVAS, 255)
    draw = ImageDraw.Draw(canvas)
    for index, shape in enumerate(scene.shapes):
        _paint(draw, shape, index)
    if scene.writing is not None:
        draw.rectangle([OVERSAMPLE * edge for edge in _box(scene.writing)], fill=len(scene.shapes))
    side = SIZE // PATCH
    pixels = np.asarray(canvas)[::OVERSAMPLE, ::OVERSAMPLE].reshape(side, PATCH, side, PATCH)
    cover = np.stack([(pixels == index).sum((1, 3)) for index in range(len(scene.shapes) + 1)])
    return np.where(cover.max(0) >= COVERED, cover.argmax(0), -1)


def letter_at(writing: Writing, x: float) -> str:
    """The character of the writing that is drawn at, or nearest to, the column x."""
    font = _font(writing.font_size)
    left = writing.x - font.getlength(writing.text) / 2
    ends = [left + font.getlength(writing.text[: count + 1]) for count in range(len(writing.text))]
    return next((letter for letter, end in zip(writing.text, ends, strict=True) if x < end), writing.text[-1])


def _pick(rng: Generator, names) -> str:
    return list(names)[int(rng.integers(len(names)))]


def _exactly(rng: Generator, name: str, count: int, total: int, names: tuple[str, ...]) -> list[str]:
    """`total` names in random order, `count` of which are `name`."""
    others = [other for other in names if other != name]
    drawn = [name] * count + [_pick(rng, others) for _ in range(total - count)]
    return [drawn[index] for index in rng.permutation(total)]


def _write(rng: Generator) -> Writing | None:
    choice = rng.random()
    if choice < 0.15:
        return None
    text = _pick(rng, DIGITS) if choice < 0.55 else _pick(rng, WORDS)
    font_size, bold = int(rng.integers(18, 27)), bool(rng.random() < 0.5)
    left, top, right, bottom = _font(font_size).getbbox(text, anchor="mm", stroke_width=int(bold))
    # The box is symmetric around the anchor, so it is as wide as the longer half asks for.
    width, height = 2 * max(-left, right), 2 * max(-top, bottom)
    return Writing(
        text=text,
        colour=_pick(rng, COLOURS),
        x=round(float(rng.uniform(width / 2 + GAP, SIZE - width / 2 - GAP)), 2),
        y=round(float(rng.uniform(height / 2 + GAP, SIZE - height / 2 - GAP)), 2),
        width=width,
        height=height,
        font_size=font_size,
        bold=bold,
    )


def _place(rng: Generator, kinds: list[str], colours: list[str], writing: Writing | None) -> tuple[Shape, ...]:
    """Tries random layouts, with fewer and fewer large shapes, until one has room for everything."""
    chance_of_large = 0.5
    while True:
        is_large = rng.random(len(kinds)) < chance_of_large
        radii = np.where(is_large, rng.uniform(*LARGE, len(kinds)), rng.uniform(*SMALL, len(kinds))).tolist()
        centres: list[tuple[float, float]] = []
        for index, radius in enumerate(radii):
            for x, y in rng.uniform(radius + 1, SIZE - radius - 1, size=(40, 2)).tolist():
                near = (math.dist((x, y), centre) < radius + r + GAP for centre, r in zip(centres, radii, strict=False))
                if not any(near) and (writing is None or _to_box(x, y, writing) >= radius + GAP):
                    centres.append((x, y))
                    break
            if len(centres) <= index:
                break
        if len(centres) == len(kinds):
            angles = rng.uniform(-0.25, 0.25, size=len(kinds))
            parts = zip(kinds, colours, centres, radii, angles, strict=True)
            return tuple(
                Shape(kind, colour, round(x, 2), round(y, 2), round(r, 2), round(float(angle), 3))
                for kind, colour, (x, y), r, angle in parts
            )
        chance_of_large *= 0.9


def _box(writing: Writing) -> tuple[float, float, float, float]:
    half_width, half_height = writing.width / 2, writing.height / 2
    return (writing.x - half_width, writing.y - half_height, writing.x + half_width, writing.y + half_height)


def _to_box(x: float, y: float, writing: Writing) -> float:
    """Distance in pixels from a point to the writing's box."""
    left, top, right, bottom = _box(writing)
    return math.hypot(max(left - x, 0, x - right), max(top - y, 0, y - bottom))


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = _FONTS.get(size)
    if font is None:
        loaded = ImageFont.load_default(size)
        if not isinstance(loaded, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType, so it has no scalable font; install a Pillow wheel.")
        font = _FONTS[size] = loaded
    return font


_FONTS: dict[int, ImageFont.FreeTypeFont] = {}


def _background(scene: Scene) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3]."""
    rng = np.random.default_rng(scene.texture_seed)
    base = np.array(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-8, 8, 3)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    strength = rng.uniform(6, 16)
    if scene.texture == "noise":
        shade = rng.normal(0, strength * 0.7, (SIZE, SIZE))
    else:
        angle = rng.uniform(0, math.pi)
        along = rows * math.sin(angle) + columns * math.cos(angle)
        if scene.texture == "stripes":
            shade = strength * np.sign(np.sin(along * 2 * math.pi / rng.uniform(8, 20)))
        elif scene.texture == "gradient":
            shade = strength * (along - along.mean()) / np.abs(along - along.mean()).max()
        else:
            shade = np.zeros((SIZE, SIZE))
    return np.clip(base + shade[..., None], 0, 255).astype(np.uint8)


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, fill) -> None:
    """Paints one shape on an oversampled canvas."""
    x, y, radius = (OVERSAMPLE * value for value in (shape.x, shape.y, shape.radius))
    if shape.kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape.kind == "ring":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=fill, width=round(radius * 0.38))
    else:
        points = _OUTLINES[shape.kind]
        cos, sin = math.cos(shape.angle) * radius, math.sin(shape.angle) * radius
        draw.polygon([(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points], fill=fill)


def _spokes(*radii: float, start: float) -> list[tuple[float, float]]:
    """Corners at equal angles around the origin, as far out as `radii` say; y grows downwards."""
    turns = [start + 2 * math.pi * index / len(radii) for index in range(len(radii))]
    return [(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(radii, turns, strict=True)]


_ARM = 0.32  # half the width of the cross's bars
_END = math.sqrt(1 - _ARM**2)
_CROSS = [(_ARM, -_END), (_ARM, -_ARM), (_END, -_ARM)]
_OUTLINES = {
    "square": _spokes(1, 1, 1, 1, start=math.pi / 4),
    "triangle": _spokes(1, 1, 1, start=-math.pi / 2),
    "star": _spokes(*(1, 0.45) * 5, start=-math.pi / 2),
    "cross": [(px * c - py * s, px * s + py * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for px, py in _CROSS],
}
