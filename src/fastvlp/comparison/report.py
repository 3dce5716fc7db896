"""report.html of a comparison: one file, nothing fetched from anywhere, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from fastvlp.comparison.charts import Line, Point, line_chart, marker
from fastvlp.comparison.results import (
    ArmRun,
    Comparison,
    Sample,
    Speedup,
    Spent,
    Summary,
    seconds,
    shown,
    spread,
    summarise,
    time_to_quality,
    title,
)
from fastvlp.config import flatten
from fastvlp.files import write_whole

PAGE = Template(files("fastvlp.comparison").joinpath("report.html").read_text("utf-8"))
AXES: tuple[tuple[str, str, Callable[[Spent], float]], ...] = (
    ("time", "training time (s)", lambda spent: spent.time),
    ("steps", "steps", lambda spent: spent.steps),
    ("pairs", "image-text pairs", lambda spent: spent.pairs),
)


def write_report(comparison: Comparison, path: Path) -> None:
    """Raises UserError where the file cannot be written."""
    write_whole(path, page(comparison).encode())


def page(comparison: Comparison) -> str:
    rows = summarise(comparison)
    body = [
        _head(comparison, rows),
        _tiles(comparison, rows),
        *(_yardstick(comparison, rows, name) for name in comparison.yardsticks),
        _speed(comparison, rows),
        _losses(comparison),
        _samples(comparison),
        _configs(comparison),
        _about(comparison),
    ]
    return PAGE.substitute(title=escape(_title(comparison)), body="\n".join(body))


def _title(comparison: Comparison) -> str:
    arms = comparison.arms
    named = ", ".join(arms[:-1]) + f" and {arms[-1]}" if len(arms) > 1 else arms[0]
    return f"{named}: {seconds(comparison.budget_s)} of training each"


def _name(comparison: Comparison, arm: str) -> str:
    i = comparison.arms.index(arm)
    swatch = f'<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">{marker(i, 7, 7, i)}</svg>'
    return f'<span class="name">{swatch}{escape(arm)}</span>'


def _sooner(speed: Speedup, reference: str) -> str:
    if not speed.n:
        return f"not timed: {reference} itself had its final score by the first mark, or has none"
    if speed.ratio is None:
        return f"does not reach {reference}'s final score"
    return f"reaches {reference}'s final score {speed} as fast"


def _head(comparison: Comparison, rows: Sequence[Summary]) -> str:
    about, n = comparison.about, comparison.seeds
    over = f"fastvlp {about.get('fastvlp', '')} · {about.get('date', '')} · {about.get('device', '')}"
    lead = f"{n} seed{'s' if n > 1 else ''}, same device, training time handed out in alternating slices. "
    scored = [row for row in rows if comparison.yardsticks and row.final(comparison.yardsticks[0])]
    if scored:
        name = comparison.yardsticks[0]
        best = max(scored, key=lambda row: getattr(row.final(name), "mean", 0.0))
        lead += f"Highest {title(name).title} {title(name).note}: <b>{escape(best.arm)}</b>, {shown(name, best.final(name))}"
        if best.arm != comparison.reference:
            lead += f"; {_sooner(best.speedups[name], escape(comparison.reference))}"
        lead += "."
    failures = [f"{escape(row.arm)}, {escape(text)}" for row in rows for text in row.failures]
    warning = f'<p class="warning">Stopped early: {"; ".join(failures)}</p>' if failures else ""
    heading = escape(_title(comparison))
    return f'<p class="overline">{escape(over)}</p><h1>{heading}</h1><p class="lead">{lead}</p>{warning}'


def _tiles(comparison: Comparison, rows: Sequence[Summary]) -> str:
    if not comparison.yardsticks:
        return '<p class="note">No mark has been scored yet.</p>'
    name, tiles = comparison.yardsticks[0], []
    for i, row in enumerate(rows):
        mean, _, wide = shown(name, row.final(name)).partition(" ± ")
        unit = " %" if title(name).percent and wide else ""
        wide = f" <small>± {wide.removesuffix(' %')}</small>" if wide else ""
        if row.arm == comparison.reference:
            speed = "the others are timed against its final score"
        else:
            speed = _sooner(row.speedups[name], comparison.reference)
        tiles.append(
            f'<div class="tile arm{i % 8}">{_name(comparison, row.arm)}<div class="big">{mean}{unit}{wide}</div>'
            f"<p>{title(name).title}</p><p>{escape(speed)}</p></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _legend(comparison: Comparison) -> str:
    return f'<div class="legend">{"".join(_name(comparison, arm) for arm in comparison.arms)}</div>'


def _points(
    runs: Sequence[ArmRun], shares: Sequence[float], name: str, at: Callable[[Spent], float], scale: float
) -> Iterator[Point]:
    """Mean and range over seeds at each mark."""
    for share in shares:
        marks = [m for run in runs for m in run.marks if m.share == share and name in m.scores]
        if marks:
            values = [m.scores[name] * scale for m in marks]
            x = sum(at(m.spent) for m in marks) / len(marks)
            yield Point(x, sum(values) / len(values), min(values), max(values))


def _yardstick(comparison: Comparison, rows: Sequence[Summary], name: str) -> str:
    about = title(name)
    scale, unit = (100.0, " %") if about.percent else (1.0, "")
    finals = [run.marks[-1].scores.get(name) for run in comparison.of(comparison.reference) if run.marks]
    level = spread([f * scale for f in finals if f is not None])
    charts = []
    for axis, label, at in AXES:
        lines = []
        for i, arm in enumerate(comparison.arms):
            runs = comparison.of(arm)
            seeds = [[(at(m.spent), m.scores[name] * scale) for m in r.marks if name in m.scores] for r in runs]
            points = list(_points(runs, comparison.shares, name, at, scale))
            lines.append(Line(arm, i, points, seeds if len(runs) > 1 else ()))
        target = level.mean if level and axis == "time" else None
        describe = f"{about.title} against {label}"
        charts.append(line_chart(lines, label=label, unit=unit, target=target, describe=describe))
    note = f"{about.note}, " if about.note else ""
    per = "per cent, " if about.percent else ""
    note = f"{note}{per}dashed: the final score of {comparison.reference}"
    many = "; mean, range and single seeds" if comparison.seeds > 1 else ""
    return (
        f'<h2>{escape(about.title)}</h2><p class="note">{escape(note + many)}.</p>'
        f'{_legend(comparison)}<div class="charts">{"".join(charts)}</div>{_scores(comparison, rows, name)}'
    )


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _scores(comparison: Comparison, rows: Sequence[Summary], name: str) -> str:
    """The numbers below a yardstick's charts."""
    times = [seconds(share * comparison.budget_s) for share in comparison.shares]
    cells = [
        [
            _name(comparison, row.arm),
            *(shown(name, s) for s in row.scores[name]),
            time_to_quality(comparison, row.arm, name),
        ]
        for row in rows
    ]
    return _html_table(["", *times, "time-to-quality"], cells)


def _speed(comparison: Comparison, rows: Sequence[Summary]) -> str:
    head = ["", "steps", "pairs", "pairs/s", "predicted tokens/s", "data wait", "CPU s a second"]
    cells = [
        [_name(comparison, row.arm)]
        + [f"{n:,.0f}" for n in (row.steps, row.pairs, row.pairs_per_s, row.tokens_per_s)]
        + [f"{row.wait:.1%}", f"{row.cpu:.2f}"]
        for row in rows
    ]
    note = (
        "Means over seeds; ± is their sample standard deviation. Time-to-quality: the training time at which "
        f"{comparison.reference} first has its own final score, divided by the time at which the arm first has it, on "
        "curves drawn straight between marks, seed by seed; ≥ where the arm has it at its first mark already. "
        "Training time is wall time inside the training steps, data wait included; scoring costs none of it. "
        "CPU: processor seconds of the main process for each second of training."
    )
    return f'<h2>What the time bought</h2>{_html_table(head, cells)}<p class="note">{escape(note)}</p>'


def _losses(comparison: Comparison) -> str:
    curves = {arm: next((run.curve for run in comparison.of(arm) if run.curve), []) for arm in comparison.arms}
    terms = {arm: list(curve[-1].losses) if curve else [] for arm, curve in curves.items()}
    charts = []
    for _, label, at in AXES:
        lines = []
        for i, (arm, curve) in enumerate(curves.items()):
            for dash, term in enumerate(terms[arm]):
                points = [Point(at(p.spent), v := p.losses[term], v, v) for p in curve]
                lines.append(Line(f"{arm} {term}", i, points, dash=dash, dots=False))
        charts.append(line_chart(lines, label=label, describe=f"training losses against {label}"))
    several = [f"{arm}: {', '.join(t)} (in this order full, dashed, dotted)" for arm, t in terms.items() if len(t) > 1]
    note = (
        "Nats a predicted token, first seed. Each method predicts other tokens from other context: "
        "compare shapes, not levels. "
    )
    return (
        f'<h2>Training losses</h2><p class="note">{escape(note + "; ".join(several))}</p>'
        f'{_legend(comparison)}<div class="charts">{"".join(charts)}</div>'
    )


def _sample(comparison: Comparison, sample: Sample) -> str:
    parts = []
    if sample.references:
        parts.append(f'<p><span class="soft">Reference:</span> {escape(sample.references[0])}</p>')
    if sample.captions:
        said = "".join(
            f"<dt>{_name(comparison, arm)}</dt><dd>{escape(text)}</dd>" for arm, text in sample.captions.items()
        )
        parts.append(f"<dl>{said}</dl>")
    for asked in sample.questions:
        answers = []
        for arm, answer in asked.answers.items():
            kind, sign = ("right", "✓") if answer == asked.right else ("wrong", "✗")
            answers.append(f'<dt>{_name(comparison, arm)}</dt><dd class="{kind}">{sign} {escape(answer)}</dd>')
        parts.append(
            f'<div class="question"><p>{escape(asked.question)} <b>{escape(asked.right)}</b></p>'
            f"<dl>{''.join(answers)}</dl></div>"
        )
    alt = escape(sample.references[0] if sample.references else sample.key, quote=True)
    # A PNG is a drawing of few pixels: enlarged with crisp edges.
    crisp = ' class="crisp"' if sample.picture.startswith("data:image/png") else ""
    return f'<div class="sample"><img{crisp} src="{sample.picture}" alt="{alt}"><div>{"".join(parts)}</div></div>'


def _samples(comparison: Comparison) -> str:
    if not comparison.samples:
        return ""
    cards = "".join(_sample(comparison, sample) for sample in comparison.samples)
    note = (
        "Validation pictures, not chosen by hand: the first of the split. "
        "Each arm after the same short fine-tuning, first seed."
    )
    return f'<h2>Captions and answers</h2><p class="note">{note}</p><div class="samples">{cards}</div>'


def _configs(comparison: Comparison) -> str:
    flat = {arm: flatten(comparison.configs[arm]) for arm in comparison.arms}
    names = list(dict.fromkeys(name for arm in comparison.arms for name in flat[arm]))
    differ = [n for n in names if len({json.dumps(flat[arm].get(n, "-")) for arm in comparison.arms}) > 1]
    head = ["", *(_name(comparison, arm) for arm in comparison.arms)]
    lines = [[escape(n), *(escape(_leaf(flat[arm].get(n, ""))) for arm in comparison.arms)] for n in differ]
    table = _html_table(head, lines) if differ else ""
    whole = "".join(
        f"<details><summary>{_name(comparison, arm)}</summary>"
        f"<pre>{escape(json.dumps(comparison.configs[arm], indent=2, ensure_ascii=False))}</pre></details>"
        for arm in comparison.arms
    )
    return f'<h2>Configurations</h2><p class="note">What differs between the arms, then each in full.</p>{table}{whole}'


def _leaf(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _about(comparison: Comparison) -> str:
    facts = {**comparison.about, **{f"setting: {name}": value for name, value in comparison.settings.items()}}
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_leaf(v))}</dd>" for k, v in facts.items())
    dropped = {run.arm: run.dropped for run in comparison.runs if run.dropped}
    note = f"<p>Unreadable records dropped in training: {escape(json.dumps(dropped))}</p>" if dropped else ""
    return f'<h2>About this run</h2><dl class="about">{rows}</dl>{note}'
