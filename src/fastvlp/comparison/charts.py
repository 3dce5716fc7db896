"""Line charts as SVG text. The style sheet of the page gives the colours, so the charts follow light and dark.

Classes: `line`, `seed`, `dot`, `whisker` with `arm0 ... arm7`; `grid`, `tick`, `caption`, `level`, `target`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 40
DASHES = ("", "5 3", "1.5 3", "8 3 1.5 3")


class Point(NamedTuple):
    """A point with a whisker from `low` to `high`; without one where both equal y."""

    x: float
    y: float
    low: float
    high: float


class Line(NamedTuple):
    """A curve of a chart.

    Attributes:
        colour: index of the arm.
        seeds: the single runs behind the mean, drawn faintly.
        dash: index of the dash pattern.
        dots: whether the points are marked.
    """

    name: str
    colour: int
    points: Sequence[Point]
    seeds: Sequence[Sequence[tuple[float, float]]] = ()
    dash: int = 0
    dots: bool = True


class Dot(NamedTuple):
    """A value of an arm with a bar from `low` to `high`. `colour`: index of the arm."""

    name: str
    colour: int
    value: float
    low: float
    high: float


class Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` ticks that cover [low, high], at multiples of 1, 2, 2.5 or 5 times a power of ten."""
    span = max(high - low, 1e-9 * max(abs(high), 1))
    raw = span / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for a tick: 12k, 1.5M, 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a)} {y(b)}" for a, b in points)


def _axes(x: Scale, y: Scale, xs: Sequence[float], ys: Sequence[float], label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{short(value)}</text>')
    for value in xs:
        parts.append(f'<text class="tick" x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="caption" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>')
    return parts


def marker(shape: int, x: float, y: float, colour: int, text: str = "") -> str:
    """A dot. Each arm has its own shape too, for readers who cannot tell the colours apart."""
    hint = f"<title>{escape(text)}</title>" if text else ""
    kind = f'class="dot arm{colour % 8}"'
    if shape % 4 == 0:
        return f'<circle {kind} cx="{x}" cy="{y}" r="4.2">{hint}</circle>'
    if shape % 4 == 1:
        return f'<rect {kind} x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6">{hint}</rect>'
    reach = ((0, -5.2), (4.8, 3.6), (-4.8, 3.6)) if shape % 4 == 2 else ((0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0))
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in reach)
    return f'<polygon {kind} points="{corners}">{hint}</polygon>'


def _line(line: Line, x: Scale, y: Scale, unit: str) -> list[str]:
    arm, dash = f"arm{line.colour % 8}", DASHES[line.dash % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    parts = [f'<path class="seed {arm}" d="{_path(seed, x, y)}"/>' for seed in line.seeds if len(seed) > 1]
    if len(line.points) > 1:
        parts.append(f'<path class="line {arm}"{dashed} d="{_path([p[:2] for p in line.points], x, y)}"/>')
    for p in line.points if line.dots else ():
        if p.high > p.low:
            parts.append(f'<line class="whisker {arm}" x1="{x(p.x)}" x2="{x(p.x)}" y1="{y(p.low)}" y2="{y(p.high)}"/>')
        hint = f"{line.name}: {p.y:.3g}{unit} at {short(p.x)}"
        parts.append(marker(line.colour, x(p.x), y(p.y), line.colour, hint))
    return parts


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    unit: str = "",
    target: float | None = None,
    chance: float | None = None,
    blind: float | None = None,
    describe: str = "",
) -> str:
    """One chart as SVG; empty if there is no point. The horizontal axis starts at 0.

    Args:
        label: name of the horizontal axis.
        unit: unit of the values, for the texts shown on hovering.
        target: a value that is drawn as a dashed line.
        chance: a value that is drawn as a dotted line.
        blind: a value that is drawn as a line of dots and dashes.
        describe: what the chart shows, for screen readers.
    """
    points = [p for line in lines for p in line.points]
    if not points:
        return ""
    faint = [b for line in lines for seed in line.seeds for _, b in seed]
    values = (
        [v for p in points for v in (p.low, p.high)] + faint + [v for v in (target, chance, blind) if v is not None]
    )
    right = max([p.x for p in points] + [a for line in lines for seed in line.seeds for a, _ in seed]) or 1.0
    ys = nice_ticks(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    x = Scale(0, right * 1.02, LEFT, WIDTH - RIGHT)
    y = Scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    xs = [t for t in nice_ticks(0, right) if t <= right * 1.02]
    parts = _axes(x, y, xs, ys, label)
    for kind, level, name in (
        ("target", target, ""),
        ("target chance", chance, "chance"),
        ("target blind", blind, "text alone"),
    ):
        if level is not None:
            parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level)}" y2="{y(level)}"/>')
            if name:
                place = f'x="{WIDTH - RIGHT}" y="{y(level) - 3}"'
                parts.append(f'<text class="level" {place} text-anchor="end">{name}</text>')
    for line in lines:
        parts.extend(_line(line, x, y, unit))
    aria = escape(describe or label, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{aria}">{"".join(parts)}</svg>'


def dot_chart(dots: Sequence[Dot], *, levels: Mapping[str, float], unit: str = "", describe: str = "") -> str:
    """One value of each arm on a common axis, as SVG; empty if there is none.

    Args:
        levels: named values that are drawn as lines, such as chance.
        unit: unit of the values.
        describe: what the chart shows, for screen readers.
    """
    if not dots:
        return ""
    values = [v for dot in dots for v in (dot.low, dot.high)] + [*levels.values()]
    ticks = nice_ticks(min(0.0, *values), max(values) if max(values) > 0 else 1.0)
    left, row = 8, 30
    x = Scale(ticks[0], ticks[-1], left, WIDTH - RIGHT)
    top, bottom = 20, 20 + row * len(dots)
    parts = []
    for value in ticks:
        parts.append(f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{top}" y2="{bottom}"/>')
        text = f"{short(value)}{unit}"
        parts.append(f'<text class="tick" x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    for name, level in levels.items():
        kind = "target chance" if name == "chance" else "target blind"
        parts.append(f'<line class="{kind}" x1="{x(level)}" x2="{x(level)}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="level" x="{x(level)}" y="{top - 6}" text-anchor="middle">{escape(name)}</text>')
    for i, dot in enumerate(dots):
        at, arm = top + row * (i + 0.68), f"arm{dot.colour % 8}"
        bar = f'x1="{x(dot.low)}" x2="{x(dot.high)}" y1="{at:.1f}" y2="{at:.1f}"'
        parts.append(f'<line class="whisker {arm}" {bar}/>')
        parts.append(marker(dot.colour, x(dot.value), round(at, 1), dot.colour, f"{dot.name}: {dot.value:.3g}{unit}"))
        side, shift = ("end", -10) if x(dot.high) > WIDTH / 2 else ("start", 10)
        place = f'x="{(x(dot.low) if shift < 0 else x(dot.high)) + shift}" y="{at + 4:.1f}" text-anchor="{side}"'
        parts.append(
            f'<text class="tick" {place}>{escape(dot.name)} {dot.value:{".1f" if unit else ".3f"}}{unit}</text>'
        )
    aria = escape(describe, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 22}" role="img" aria-label="{aria}">{"".join(parts)}</svg>'
