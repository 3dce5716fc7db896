"""Scenes of the embedded corpus: random scenes, the combinations that each split may show, and pictures of scenes.

Positions and radii are fractions of the picture's side, so a scene is the same at any size in pixels.
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

from fastvlp.data.world.levels import COLOURS, STANDARD, TONES, Level

SPLITS = ("train", "val", "test")
COMBINATIONS = STANDARD.combinations
HELD_OUT = STANDARD.held_out

_MARGIN = 0.15  # the smallest offset between two centres that counts as a relation


class Look(NamedTuple):
    """Size, colour and shape of a thing, without its place."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object: centre and radius in fractions of the side, angle in radians, tint added to each colour channel."""

    look: Look
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Things on a background of a colour (`tone`) and a pattern; `clutter` is the random seed of stray lines on it."""

    things: tuple[Thing, ...]
    tone: str
    pattern: str
    clutter: int
    level: Level = STANDARD


def relation(a: Thing, b: Thing) -> str | None:
    """Returns the side of b that a is on: left, right, above or below; None if it is not clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < _MARGIN or max(abs(dx), abs(dy)) < 1.3 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _fitting_size(rng: Random, level: Level, room: float) -> str:
    """Draws a size whose bounding square fills at most `room`; the smallest if none fits."""
    smallest, radii = next(iter(level.radii)), level.radii.items()
    return rng.choice([size for size, radius in radii if size == smallest or (2 * radius) ** 2 <= room])


def _area(level: Level, looks: Sequence[Look]) -> float:
    """Returns the share of the picture that bounding squares fill."""
    return sum((2 * level.radii[look.size]) ** 2 for look in looks)


def draw_looks(rng: Random, split: str, level: Level = STANDARD) -> list[Look]:
    """Draws the looks of the things of a scene. About half of the scenes have at most three colours and three shapes, so that
    counts above one are common. In the test split the first look is a held-out combination."""
    count = rng.randint(level.least, level.most)
    pairs: list[tuple[str, str]] = [rng.choice(level.held_out)] if split == "test" else []
    pool: Sequence[tuple[str, str]] = level.allowed(split)
    if rng.random() < 0.55:
        first = pairs[0] if pairs else rng.choice(pool)
        colours = {first[0], *rng.sample(level.colours, rng.randint(1, 2))}
        shapes = {first[1], *rng.sample(level.shapes, rng.randint(1, 2))}
        pool = [pair for pair in pool if pair[0] in colours and pair[1] in shapes]
    pairs += [rng.choice(pool) for _ in range(count - len(pairs))]
    sizes: list[str] = []
    room, least = level.room, (2 * min(level.radii.values())) ** 2
    for left in range(count - 1, -1, -1):
        sizes.append(_fitting_size(rng, level, room - left * least))
        room -= (2 * level.radii[sizes[-1]]) ** 2
    rng.shuffle(sizes)
    return [Look(size, *pair) for size, pair in zip(sizes, pairs)]


def place_things(rng: Random, looks: Sequence[Look], level: Level = STANDARD) -> tuple[Thing, ...]:
    """Puts things with these looks at random places, large ones first."""
    things: list[Thing] = []
    free = rng.sample(_QUARTERS, 4) if level.quarters else []
    for look in sorted(looks, key=lambda look: -level.radii[look.size]):
        radius = level.radii[look.size] * rng.uniform(0.95, 1.05)
        x, y = _near(rng, free.pop()) if level.quarters else _free_place(rng, radius, things)
        tint = (_change(rng, level.tint), _change(rng, level.tint), _change(rng, level.tint))
        angle = rng.uniform(-level.turn, level.turn)
        things.append(Thing(look=look, x=x, y=y, radius=radius, angle=angle, tint=tint))
    return tuple(things)


def _change(rng: Random, most: int) -> int:
    return rng.randint(-most, most)


# The middles of the quarters of a picture.
_QUARTERS = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


def _near(rng: Random, place: tuple[float, float]) -> tuple[float, float]:
    """Draws a place about a pixel from another."""
    return place[0] + rng.uniform(-0.015, 0.015), place[1] + rng.uniform(-0.015, 0.015)


def _free_place(rng: Random, radius: float, things: Sequence[Thing]) -> tuple[float, float]:
    """Draws a place away from other things. The distance that they must keep shrinks with each of 80 tries; the last place is
    taken in any case."""
    for attempt in range(80):
        x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
        keep = max(0.6, 1.1 - 0.005 * attempt)
        if all(math.hypot(x - t.x, y - t.y) >= keep * (radius + t.radius) for t in things):
            break
    return x, y


def add_background(rng: Random, things: tuple[Thing, ...], level: Level = STANDARD) -> Scene:
    """Puts the things in front of a random background."""
    tone, pattern = rng.choice(level.tones), rng.choice(level.patterns)
    return Scene(things=things, tone=tone, pattern=pattern, clutter=rng.getrandbits(32), level=level)


def draw_scene(rng: Random, split: str, level: Level = STANDARD) -> Scene:
    """Draws a random scene of a split."""
    return add_background(rng, place_things(rng, draw_looks(rng, split, level), level), level)


def draw_single(rng: Random, colour: str, shape: str, level: Level = STANDARD) -> Scene:
    """Draws a scene of one large thing."""
    radius = rng.uniform(0.28, 0.38)
    x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
    tint = (_change(rng, 12), _change(rng, 12), _change(rng, 12))
    look = Look("large", colour, shape)
    thing = Thing(look=look, x=x, y=y, radius=radius, angle=rng.uniform(-0.2, 0.2), tint=tint)
    return add_background(rng, (thing,), level)


def edit_look(rng: Random, looks: Sequence[Look], level: Level = STANDARD) -> list[Look]:
    """Returns a scene's looks after one small change: another colour, shape or size of one thing, or one thing more or fewer.

    Each change is as likely as the change that undoes it, so texts about edited scenes and about original scenes do not differ
    in style. A held-out combination is replaced only by another held-out one.
    """
    looks = list(looks)
    at = rng.randrange(len(looks))
    size, colour, shape = looks[at]
    change = rng.choice(("combination", "combination", "combination", "size", "number"))
    if change == "number":
        if (colour, shape) in level.seen and len(looks) > level.least and rng.random() < 0.5:
            del looks[at]
        elif len(looks) < level.most:
            looks.append(Look(_fitting_size(rng, level, level.room - _area(level, looks)), *rng.choice(level.seen)))
        return looks
    if change == "size":
        looks[at] = Look(rng.choice([other for other in level.radii if other != size]), colour, shape)
    elif (colour, shape) in level.held_out:
        looks[at] = Look(size, *rng.choice([pair for pair in level.held_out if pair != (colour, shape)]))
    else:
        near = [pair for pair in level.seen if (pair[0] == colour) != (pair[1] == shape)]
        looks[at] = Look(size, *rng.choice(near))
    return looks


def _heart() -> list[tuple[float, float]]:
    """Corners of a heart."""
    turns = [2 * math.pi * i / 32 for i in range(32)]
    return [
        (
            math.sin(t) ** 3 * 1.05,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5 - 0.1,
        )
        for t in turns
    ]


def _around(radii: Sequence[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Returns corners at equal angles around the centre, at these distances from it."""
    turns = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns)]


_A, _B = 1.0, 0.34
# Corners in units of the thing's radius, y downwards. Circle and ring are drawn as ellipses; their corners give the box.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _around([1.0] * 32),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.86), (-1.05, 0.86)],
    "diamond": [(0.0, -1.12), (0.78, 0.0), (0.0, 1.12), (-0.78, 0.0)],
    "star": _around([1.15, 0.46] * 5),
    "cross": [
        *((-_B, -_A), (_B, -_A), (_B, -_B), (_A, -_B), (_A, _B), (_B, _B)),
        *((_B, _A), (-_B, _A), (-_B, _B), (-_A, _B), (-_A, -_B), (-_B, -_B)),
    ],
    "heart": _heart(),
    "ring": _around([1.0] * 32),
}


def _points(thing: Thing, scale: float, shrink: float = 1.0) -> list[tuple[float, float]]:
    """Returns the corners of a thing in pixels, for a picture with side `scale`."""
    reach = thing.radius * shrink
    c, s = reach * math.cos(thing.angle), reach * math.sin(thing.angle)
    outline = _OUTLINES[thing.look.shape]
    return [((thing.x + c * x - s * y) * scale, (thing.y + s * x + c * y) * scale) for x, y in outline]


def box(thing: Thing, size: int) -> list[float]:
    """Returns the box [x0, y0, x1, y1] of a thing in pixels, cut at the edge of the picture."""
    points = _points(thing, size)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [round(min(max(v, 0.0), float(size)), 1) for v in (min(xs), min(ys), max(xs), max(ys))]


def _shift(colour: Sequence[int], by: Sequence[int] | int) -> tuple[int, int, int]:
    """Makes a colour lighter or darker."""
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
    for _ in range(rng.randint(0, scene.level.lines)):
        fill = _shift(tone, rng.choice((-45, -30, 30, 45)))
        x, y, turn = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi)
        length = side * rng.uniform(0.005, 0.12)
        draw.line((x, y, x + length * math.cos(turn), y + length * math.sin(turn)), fill=fill, width=side // 80)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    colour = _shift(COLOURS[thing.look.colour], thing.tint)
    edge = (colour[0] * 2 // 5, colour[1] * 2 // 5, colour[2] * 2 // 5)
    line = 0.008 * side if thing.look.shape == "ring" else 0.012 * side
    inner = 1 - line / (thing.radius * side)
    if thing.look.shape not in ("circle", "ring"):
        draw.polygon(_points(thing, side), fill=edge)
        draw.polygon(_points(thing, side, inner), fill=colour)
        return
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    hole = 0.46 * r if thing.look.shape == "ring" else 0.0
    for reach, fill, end in ((r, edge, hole), (inner * r, colour, hole + line if hole else 0.0)):
        frame = (x - reach, y - reach, x + reach, y + reach)
        if hole:
            draw.ellipse(frame, outline=fill, width=round(reach - end))
        else:
            draw.ellipse(frame, fill=fill)


def render(scene: Scene, size: int) -> bytes:
    """Draws the scene as a PNG of size x size pixels. It is drawn larger and averaged down, for smooth edges."""
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
