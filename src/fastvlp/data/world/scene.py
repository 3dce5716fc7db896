"""Scenes of the embedded corpus: what is in them, which combinations each split may show, and how they are drawn.

Positions and radii are fractions of the picture's side, so a scene is the same scene at any pixel size.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

SPLITS = ("train", "val", "test")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "orange": (250, 138, 16),
    "yellow": (248, 222, 32),
    "green": (34, 158, 56),
    "cyan": (40, 212, 220),
    "blue": (34, 76, 228),
    "purple": (134, 44, 186),
    "pink": (250, 132, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
RADII = {"small": 0.11, "medium": 0.16, "large": 0.225}
SIZES = tuple(RADII)
TONES: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "beige": (224, 210, 184),
    "grey": (150, 152, 154),
    "black": (22, 22, 24),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "shaded")

COMBINATIONS = tuple(itertools.product(COLOURS, SHAPES))
# One shape of each colour and one colour of each shape: nothing but the combination is new in the test split.
HELD_OUT = tuple((colour, SHAPES[(3 * i + 2) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SEEN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)

MOST_THINGS = 6
_ROOM = 0.42  # most of the picture that bounding squares may fill
_MARGIN = 0.15  # the least offset that is called a relation


class Kind(NamedTuple):
    """What is said of a thing, whatever its place."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: centre and radius in fractions of the side, angle in radians, tint added to each colour channel."""

    kind: Kind
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`clutter` seeds the specks and scratches of the background."""

    things: tuple[Thing, ...]
    tone: str
    pattern: str
    clutter: int


def allowed(split: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) combinations that a split may show or name."""
    return COMBINATIONS if split == "test" else SEEN


def relation(a: Thing, b: Thing) -> str | None:
    """Where a is, seen from b: left, right, above, below, or None where a person might hesitate."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < _MARGIN or max(abs(dx), abs(dy)) < 1.3 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _fitting_size(rng: Random, room: float) -> str:
    return rng.choice([size for size in SIZES if size == "small" or (2 * RADII[size]) ** 2 <= room])


def _area(kinds: Sequence[Kind]) -> float:
    return sum((2 * RADII[kind.size]) ** 2 for kind in kinds)


def draw_kinds(rng: Random, split: str) -> list[Kind]:
    """2 to 6 kinds. About half of the scenes repeat few colours and shapes, so that counts above one are common.

    In the test split the first kind is a held-out combination.
    """
    count = rng.randint(2, MOST_THINGS)
    pairs: list[tuple[str, str]] = [rng.choice(HELD_OUT)] if split == "test" else []
    pool: Sequence[tuple[str, str]] = allowed(split)
    if rng.random() < 0.55:
        first = pairs[0] if pairs else rng.choice(pool)
        colours = {first[0], *rng.sample(tuple(COLOURS), rng.randint(1, 2))}
        shapes = {first[1], *rng.sample(SHAPES, rng.randint(1, 2))}
        pool = [pair for pair in pool if pair[0] in colours and pair[1] in shapes]
    pairs += [rng.choice(pool) for _ in range(count - len(pairs))]
    sizes: list[str] = []
    room = _ROOM
    for left in range(count - 1, -1, -1):
        sizes.append(_fitting_size(rng, room - left * (2 * RADII["small"]) ** 2))
        room -= (2 * RADII[sizes[-1]]) ** 2
    rng.shuffle(sizes)
    return [Kind(size, *pair) for size, pair in zip(sizes, pairs)]


def arrange(rng: Random, kinds: Sequence[Kind]) -> tuple[Thing, ...]:
    """Places the kinds, large ones first; the distance asked for shrinks with each try, so that it always ends."""
    things: list[Thing] = []
    for kind in sorted(kinds, key=lambda kind: -RADII[kind.size]):
        radius = RADII[kind.size] * rng.uniform(0.95, 1.05)
        for attempt in range(80):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            keep = max(0.6, 1.1 - 0.005 * attempt)
            if all(math.hypot(x - t.x, y - t.y) >= keep * (radius + t.radius) for t in things):
                break
        tint = (rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12))
        things.append(Thing(kind=kind, x=x, y=y, radius=radius, angle=rng.uniform(-0.2, 0.2), tint=tint))
    return tuple(things)


def on_background(rng: Random, things: tuple[Thing, ...]) -> Scene:
    tone, pattern = rng.choice(tuple(TONES)), rng.choice(PATTERNS)
    return Scene(things=things, tone=tone, pattern=pattern, clutter=rng.getrandbits(32))


def draw_scene(rng: Random, split: str) -> Scene:
    return on_background(rng, arrange(rng, draw_kinds(rng, split)))


def draw_single(rng: Random, colour: str, shape: str) -> Scene:
    """One large thing somewhere about the centre."""
    radius = rng.uniform(0.28, 0.38)
    x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
    tint = (rng.randint(-12, 12), rng.randint(-12, 12), rng.randint(-12, 12))
    kind = Kind("large", colour, shape)
    thing = Thing(kind=kind, x=x, y=y, radius=radius, angle=rng.uniform(-0.2, 0.2), tint=tint)
    return on_background(rng, (thing,))


def edit_kinds(rng: Random, kinds: Sequence[Kind], split: str) -> list[Kind]:
    """The smallest change of what is there: one thing's colour, shape or size, or one thing more or less.

    Each change is as likely as the one that undoes it, so sentences about the edited scene read like sentences about
    the scene itself. A held-out combination is exchanged for a held-out one only.
    """
    kinds = list(kinds)
    at = rng.randrange(len(kinds))
    size, colour, shape = kinds[at]
    change = rng.choice(("combination", "combination", "combination", "size", "number"))
    if change == "number":
        if (colour, shape) in SEEN and len(kinds) > 2 and rng.random() < 0.5:
            del kinds[at]
        elif len(kinds) < MOST_THINGS:
            kinds.append(Kind(_fitting_size(rng, _ROOM - _area(kinds)), *rng.choice(SEEN)))
        return kinds
    if change == "size":
        kinds[at] = Kind(rng.choice([other for other in SIZES if other != size]), colour, shape)
    elif (colour, shape) in HELD_OUT:
        kinds[at] = Kind(size, *rng.choice([pair for pair in HELD_OUT if pair != (colour, shape)]))
    else:
        near = [pair for pair in SEEN if (pair[0] == colour) != (pair[1] == shape)]
        kinds[at] = Kind(size, *rng.choice(near))
    return kinds


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 32 for i in range(32)]
    return [
        (
            math.sin(t) ** 3 * 1.05,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5 - 0.1,
        )
        for t in turns
    ]


def _round(radii: Sequence[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    turns = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns)]


_A, _B = 1.0, 0.34
# Corner points in units of the thing's radius, y downwards; circle and ring are drawn as ellipses.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _round([1.0] * 32),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.86), (-1.05, 0.86)],
    "diamond": [(0.0, -1.12), (0.78, 0.0), (0.0, 1.12), (-0.78, 0.0)],
    "star": _round([1.15, 0.46] * 5),
    "cross": [
        *((-_B, -_A), (_B, -_A), (_B, -_B), (_A, -_B), (_A, _B), (_B, _B)),
        *((_B, _A), (-_B, _A), (-_B, _B), (-_A, _B), (-_A, -_B), (-_B, -_B)),
    ],
    "heart": _heart(),
    "ring": _round([1.0] * 32),
}


def _points(thing: Thing, scale: float, shrink: float = 1.0) -> list[tuple[float, float]]:
    """The outline in pixels of a picture with side `scale`."""
    reach = thing.radius * shrink
    c, s = reach * math.cos(thing.angle), reach * math.sin(thing.angle)
    outline = _OUTLINES[thing.kind.shape]
    return [((thing.x + c * x - s * y) * scale, (thing.y + s * x + c * y) * scale) for x, y in outline]


def box(thing: Thing, size: int) -> list[float]:
    """[x0, y0, x1, y1] in pixels, clipped to the picture."""
    points = _points(thing, size)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [round(min(max(v, 0.0), float(size)), 1) for v in (min(xs), min(ys), max(xs), max(ys))]


def _shift(colour: Sequence[int], by: Sequence[int] | int) -> tuple[int, int, int]:
    deltas = (by, by, by) if isinstance(by, int) else by
    r, g, b = (min(max(v + d, 0), 255) for v, d in zip(colour, deltas))
    return r, g, b


def _draw_background(draw: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    rng = Random(scene.clutter)
    tone = TONES[scene.tone]
    other = _shift(tone, 26 if scene.tone == "black" else -22)
    step = side * rng.uniform(0.1, 0.18)
    cells = range(math.ceil(side / step))
    if scene.pattern == "striped":
        upright = rng.random() < 0.5
        for i in cells:
            at, to = i * step, i * step + step / 2
            draw.rectangle((at, 0, to, side) if upright else (0, at, side, to), fill=other)
    elif scene.pattern == "checked":
        for i, j in itertools.product(cells, cells):
            if (i + j) % 2:
                draw.rectangle((i * step, j * step, (i + 1) * step, (j + 1) * step), fill=other)
    elif scene.pattern == "dotted":
        for i, j in itertools.product(cells, cells):
            x, y = (i + 0.5) * step, (j + 0.5) * step
            draw.ellipse((x - step / 6, y - step / 6, x + step / 6, y + step / 6), fill=other)
    elif scene.pattern == "shaded":
        towards = 70 if scene.tone == "black" else -60
        for i in range(16):
            draw.rectangle((0, i * side / 16, side, (i + 1) * side / 16), fill=_shift(tone, towards * i // 16))
    for _ in range(rng.randint(0, 6)):
        fill = _shift(tone, rng.choice((-45, -30, 30, 45)))
        x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi)
        length = side * rng.uniform(0.005, 0.12)
        draw.line((x, y, x + length * math.cos(turn), y + length * math.sin(turn)), fill=fill, width=side // 80)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    colour = _shift(COLOURS[thing.kind.colour], thing.tint)
    edge = (colour[0] * 2 // 5, colour[1] * 2 // 5, colour[2] * 2 // 5)
    line = 0.008 * side if thing.kind.shape == "ring" else 0.012 * side
    inner = 1 - line / (thing.radius * side)
    if thing.kind.shape not in ("circle", "ring"):
        draw.polygon(_points(thing, side), fill=edge)
        draw.polygon(_points(thing, side, inner), fill=colour)
        return
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    hole = 0.46 * r if thing.kind.shape == "ring" else 0.0
    for reach, fill, end in ((r, edge, hole), (inner * r, colour, hole + line if hole else 0.0)):
        frame = (x - reach, y - reach, x + reach, y + reach)
        if hole:
            draw.ellipse(frame, outline=fill, width=round(reach - end))
        else:
            draw.ellipse(frame, fill=fill)


def render(scene: Scene, size: int) -> bytes:
    """The scene as a PNG of size x size pixels, drawn larger and averaged down."""
    times = 4 if size <= 128 else 2
    side = size * times
    image = Image.new("RGB", (side, side), TONES[scene.tone])
    draw = ImageDraw.Draw(image)
    _draw_background(draw, scene, side)
    for thing in scene.things:
        _draw_thing(draw, thing, side)
    stream = io.BytesIO()
    image.reduce(times).save(stream, "PNG", compress_level=4)
    return stream.getvalue()
