"""Writes report.html of a comparison: one file that needs no other, with colours for light and dark mode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from fastvlp.comparison.charts import Dot, Line, Point, dot_chart, line_chart, marker
from fastvlp.comparison.findings import DIFFERENCES, differences, findings
from fastvlp.comparison.metrics.interface import Score
from fastvlp.comparison.results import ArmRun, Comparison, Sample, TrainingCost
from fastvlp.comparison.summary import (
    Summary,
    added_note,
    busy_note,
    code_note,
    format_duration,
    format_length,
    format_score,
    format_speedup,
    measured_scores,
    shown_marks,
    spread,
    summarise,
    within_noise,
)
from fastvlp.config import flatten
from fastvlp.files import write_whole

PAGE = Template(files("fastvlp.comparison").joinpath("report.html").read_text("utf-8"))
AXES: tuple[tuple[str, Callable[[TrainingCost], float]], ...] = (
    ("training time (s)", lambda spent: spent.time),
    ("steps", lambda spent: spent.steps),
    ("image-text pairs", lambda spent: spent.pairs),
)
TIME = AXES[0][0]


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the report. Raises UserError if the file cannot be written."""
    write_whole(path, page(comparison).encode())


def page(comparison: Comparison) -> str:
    """Returns the report as HTML, also of a comparison that is not finished."""
    rows, scores = summarise(comparison), measured_scores(comparison)
    body = [
        _head(comparison, rows),
        _answer(comparison, rows, scores),
        *(_score_section(comparison, rows, score) for score in scores),
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
    return f"{named}: {format_length(comparison)} of training each"


def _name(comparison: Comparison, arm: str) -> str:
    i = comparison.arms.index(arm)
    swatch = f'<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">{marker(i, 7, 7, i)}</svg>'
    return f'<span class="name">{swatch}{escape(arm)}</span>'


def _head(comparison: Comparison, rows: Sequence[Summary]) -> str:
    about = comparison.about
    over = f"fastvlp {about.get('fastvlp', '')} · {about.get('date', '')} · {about.get('device', '')}"
    failures = [f"{escape(row.arm)}, {escape(text)}" for row in rows for text in row.failures]
    warning = f'<p class="warning">Stopped early: {"; ".join(failures)}</p>' if failures else ""
    if not comparison.finished:
        warning = f'<p class="warning">This comparison is not finished: its numbers will change.</p>{warning}'
    for note in filter(None, (added_note(comparison), code_note(comparison))):
        warning += f'<p class="warning">{escape(note)}</p>'
    return f'<p class="overline">{escape(over)}</p><h1>{escape(_title(comparison))}</h1>{warning}'


def _answer(comparison: Comparison, rows: Sequence[Summary], scores: Sequence[Score]) -> str:
    """Returns a description of the comparison, and its result in sentences and in one table."""
    sentences = [_without_breaks_in_numbers(escape(sentence)) for sentence in findings(comparison)]
    described = f"<p>{escape(_description(comparison))}</p>"
    if not sentences:
        return f'{described}<p class="note">No arm has been scored yet.</p>'
    more = "".join(f"<li>{sentence}</li>" for sentence in sentences[1:])
    return (
        f'{described}<p class="lead">{sentences[0]}</p>{f"<ul>{more}</ul>" if more else ""}'
        f'{_final_scores(comparison, rows, scores)}<p class="note">{escape(_certainty(comparison))}</p>'
    )


def _without_breaks_in_numbers(text: str) -> str:
    """Returns a text in which a line never ends between a number and its error or unit."""
    return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _final_scores(comparison: Comparison, rows: Sequence[Summary], scores: Sequence[Score]) -> str:
    """Returns the table of the last score of each arm. Below are the scores of chance and of the texts alone."""
    best = {
        score.name: max((final for row in rows if (final := row.final(score.name))), key=lambda final: final.mean)
        for score in scores
    }
    cells = []
    for row in rows:
        line = [_name(comparison, row.arm), escape(" + ".join(comparison.configs[row.arm].get("objectives", {})))]
        for score in scores:
            final, text = row.final(score.name), format_score(score, row.final(score.name))
            line.append(f"<b>{text}</b>" if final and within_noise(final, best[score.name]) else text)
        cells.append(line)
    for name, levels in (("text alone", comparison.blind), ("chance", comparison.chance)):
        if levels:
            known = [spread([levels[score.name]]) if score.name in levels else None for score in scores]
            cells.append([name, "", *(format_score(score, level) for score, level in zip(scores, known))])
    return _html_table(["", "objective", *(escape(score.title) for score in scores)], cells)


def _description(comparison: Comparison) -> str:
    """Returns sentences that say which arms trained for how long, and in what they differ."""
    clock = "CPU time, which does not count other programs" if comparison.clock == "cpu" else "wall time"
    if comparison.counted == "steps":
        clock = f"their times are {clock}"
    parts = differences(comparison)
    differ = "the fields in the table of configurations" if len(parts) > DIFFERENCES else ", ".join(parts)
    runs = f"with {comparison.seeds} seeds" if comparison.seeds > 1 else "once"
    return (
        f"Each arm trained {runs} for {format_length(comparison)} ({clock}), {_turns(comparison)}on one device. "
        f"The arms differ in {differ or 'nothing'}; all other settings are equal."
    )


def _turns(comparison: Comparison) -> str:
    """Returns which arms trained in turns, and how long a turn was; empty for a single arm."""
    together = [arm for arm in comparison.arms if arm not in comparison.added]
    length = comparison.settings.get("slice_s")
    if len(together) < 2 or length is None:
        return ""
    turn = f"{length:,.0f} steps" if comparison.counted == "steps" else format_duration(length)
    named = f"{', '.join(together[:-1])} and {together[-1]} " if comparison.added else ""
    return f"{named}in turns of {turn}, "


def _certainty(comparison: Comparison) -> str:
    """Returns sentences that say how certain the scores are."""
    meaning = (
        "± is the standard deviation over seeds"
        if comparison.seeds > 1
        else "Single runs: ± is the standard error over the scored items, and other seeds may differ by more"
    )
    text = f"{meaning}. Bold: the highest score, and all scores whose difference to it is within two standard errors."
    return " ".join(filter(None, (text, busy_note(comparison))))


def _legend(comparison: Comparison, arms: Iterable[str]) -> str:
    return f'<div class="legend">{"".join(_name(comparison, arm) for arm in arms)}</div>'


def _points(
    runs: Sequence[ArmRun], shares: Sequence[float], name: str, at: Callable[[TrainingCost], float], scale: float
) -> Iterator[Point]:
    """Yields the mean and the range over seeds at each share of the budget."""
    for share in shares:
        marks = [m for run in runs for m in run.marks if m.share == share and name in m.scores]
        if marks:
            values = [m.scores[name] * scale for m in marks]
            x = sum(at(m.spent) for m in marks) / len(marks)
            yield Point(x, sum(values) / len(values), min(values), max(values))


def _score_section(comparison: Comparison, rows: Sequence[Summary], score: Score) -> str:
    note, once = score.note, measured_once(rows, score)
    if score.percent:
        note += f"{', ' if note else ''}in per cent"
    if once:
        note += f"{'; ' if note else ''}bars are two standard errors to each side"
    elif any(row.arm == comparison.reference and row.final(score.name) for row in rows):
        note += f"{'; ' if note else ''}the dashed line is the final score of {comparison.reference}"
    if (chance := comparison.chance.get(score.name)) is not None:
        note += f"; the dotted line is chance, {format_score(score, spread([chance]))}"
    if (blind := comparison.blind.get(score.name)) is not None:
        note += (
            f"; the line of dots and dashes is the score from the text alone, {format_score(score, spread([blind]))}"
        )
    if comparison.seeds > 1 and not once:
        note += "; thick lines show the mean over seeds, whiskers their range, and thin lines the single seeds"
    note = f"{note[:1].upper()}{note[1:]}."
    head = f'<h2>{escape(score.title)}</h2><p class="note">{escape(note)}</p>'
    scored = [row.arm for row in rows if row.final(score.name)]
    if once:
        return f'{head}<div class="single">{_final_chart(comparison, rows, score)}</div>'
    return (
        f'{head}{_legend(comparison, scored)}<div class="charts">{_score_charts(comparison, score)}</div>'
        f"{_score_table(comparison, rows, score)}"
    )


def measured_once(rows: Sequence[Summary], score: Score) -> bool:
    """Whether every arm has the score at one mark at most, so that there is no curve."""
    return all(sum(value is not None for value in row.scores[score.name]) < 2 for row in rows)


def _final_chart(comparison: Comparison, rows: Sequence[Summary], score: Score) -> str:
    """Draws the last score of each arm, with lines for chance and for the text alone."""
    scale, unit = (100.0, " %") if score.percent else (1.0, "")
    dots = []
    for i, row in enumerate(rows):
        if (final := row.final(score.name)) is not None:
            reach = 2 * final.standard_error
            low, high = (final.mean - reach) * scale, (final.mean + reach) * scale
            dots.append(Dot(row.arm, i, final.mean * scale, low, high))
    levels = {
        name: at[score.name] * scale
        for name, at in (("chance", comparison.chance), ("text alone", comparison.blind))
        if score.name in at
    }
    return dot_chart(dots, levels=levels, unit=unit, describe=f"{score.title} at the end")


def _score_charts(comparison: Comparison, score: Score) -> str:
    """Draws a score against time, steps and pairs."""
    name, scale, unit = score.name, *((100.0, " %") if score.percent else (1.0, ""))
    finals = [run.marks[-1].scores.get(name) for run in comparison.runs_of(comparison.reference) if run.marks]
    level = spread([f * scale for f in finals if f is not None])
    charts = []
    for label, at in AXES:
        lines = []
        for i, arm in enumerate(comparison.arms):
            runs = comparison.runs_of(arm)
            seeds = [[(at(m.spent), m.scores[name] * scale) for m in r.marks if name in m.scores] for r in runs]
            points = list(_points(runs, comparison.shares, name, at, scale))
            lines.append(Line(arm, i, points, seeds if len(runs) > 1 else ()))
        target = level.mean if level and label == TIME else None
        chance = comparison.chance[name] * scale if name in comparison.chance else None
        blind = comparison.blind[name] * scale if name in comparison.blind else None
        description = f"{score.title} against {label}"
        levels = {"target": target, "chance": chance, "blind": blind}
        charts.append(line_chart(lines, label=label, unit=unit, **levels, describe=description))
    return "".join(charts)


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _score_table(comparison: Comparison, rows: Sequence[Summary], score: Score) -> str:
    """Returns the table below a score's charts."""
    shown = shown_marks(comparison)
    times = [format_length(comparison, comparison.shares[i]) for i in shown]
    cells = [
        [
            _name(comparison, row.arm),
            *(format_score(score, row.scores[score.name][i]) for i in shown),
            format_speedup(comparison, row.arm, score.name),
        ]
        for row in rows
        if row.final(score.name)
    ]
    return _html_table(["", *times, "time-to-quality"], cells)


def _speed(comparison: Comparison, rows: Sequence[Summary]) -> str:
    head = ["", "steps", "pairs", "pairs/s", "predicted tokens/s", "waiting for data", "CPU s per s", "scoring (s)"]
    cells = [
        [_name(comparison, row.arm)]
        + [f"{n:,.0f}" for n in (row.steps, row.pairs, row.pairs_per_s, row.tokens_per_s)]
        + [f"{row.wait:.1%}", f"{row.cpu:.2f}", f"{row.scoring_s:.0f}"]
        for row in rows
    ]
    reference = comparison.reference
    note = (
        "All numbers are means over seeds. ± is the sample standard deviation; for a single run it is the standard error over "
        "the scored items. "
        f"Time-to-quality compares how soon an arm reaches the final score of {reference}: it is the time that "
        f"{reference} needs, divided by the time that the arm needs. It is computed for each seed. Between two scorings, "
        "scores are interpolated linearly. A ≥ marks an arm that had already reached the score at its first scoring. "
        "Training time counts only training steps, not scoring. On a CPU it is the CPU time of the process, over all threads; "
        "on a GPU it is wall time. CPU s per s: CPU seconds of the main process in each wall second of training. "
        "Scoring: wall seconds of all scorings of a run together."
    )
    return f'<h2>Work done in the training time</h2>{_html_table(head, cells)}<p class="note">{escape(note)}</p>'


def _losses(comparison: Comparison) -> str:
    curves = {arm: next((run.curve for run in comparison.runs_of(arm) if run.curve), []) for arm in comparison.arms}
    terms = {arm: list(curve[-1].losses) if curve else [] for arm, curve in curves.items()}
    charts = []
    for label, at in AXES:
        lines = []
        for i, (arm, curve) in enumerate(curves.items()):
            for dash, term in enumerate(terms[arm]):
                points = [Point(at(p.spent), v := p.losses[term], v, v) for p in curve]
                lines.append(Line(f"{arm} {term}", i, points, dash=dash, dots=False))
        charts.append(line_chart(lines, label=label, describe=f"training losses against {label}"))
    several = [f"{arm} has {', '.join(t)} (solid, dashed, dotted)" for arm, t in terms.items() if len(t) > 1]
    note = (
        "Losses of the first seed, in nats for each predicted token. The methods predict different tokens from different "
        "context, so compare the shapes of the curves and not their heights. "
    )
    return (
        f'<h2>Training losses</h2><p class="note">{escape(note + "; ".join(several) + ("." if several else ""))}</p>'
        f'{_legend(comparison, comparison.arms)}<div class="charts">{"".join(charts)}</div>'
    )


def _sample(comparison: Comparison, sample: Sample) -> str:
    parts = []
    if sample.references:
        parts.append(f'<p><span class="soft">Reference:</span> {escape(sample.references[0])}</p>')
    if sample.captions:
        captions = "".join(
            f"<dt>{_name(comparison, arm)}</dt><dd>{escape(text)}</dd>" for arm, text in sample.captions.items()
        )
        parts.append(f"<dl>{captions}</dl>")
    for question in sample.questions:
        answers = []
        for arm, answer in question.answers.items():
            kind, sign = ("right", "✓") if answer == question.right else ("wrong", "✗")
            answers.append(f'<dt>{_name(comparison, arm)}</dt><dd class="{kind}">{sign} {escape(answer)}</dd>')
        parts.append(
            f'<div class="question"><p>{escape(question.question)} <b>{escape(question.right)}</b></p>'
            f"<dl>{''.join(answers)}</dl></div>"
        )
    alt = escape(sample.references[0] if sample.references else sample.key, quote=True)
    # PNGs are the small drawings of the embedded corpus, which look better enlarged without smoothing.
    crisp = ' class="crisp"' if sample.picture.startswith("data:image/png") else ""
    return f'<div class="sample"><img{crisp} src="{sample.picture}" alt="{alt}"><div>{"".join(parts)}</div></div>'


def _samples(comparison: Comparison) -> str:
    if not comparison.samples:
        return ""
    cards = "".join(_sample(comparison, sample) for sample in comparison.samples)
    note = (
        "These are the first pictures of the scored split; they were not selected. Answers and captions are from the first "
        "seed. Each arm gives its answers after the same short fine-tuning. Captions are shown for the arms that have learned "
        "to write. They are written without fine-tuning, unless CIDEr was measured."
    )
    return f'<h2>Captions and answers</h2><p class="note">{note}</p><div class="samples">{cards}</div>'


def _configs(comparison: Comparison) -> str:
    flat = {arm: flatten(comparison.configs[arm]) for arm in comparison.arms}
    names = list(dict.fromkeys(name for arm in comparison.arms for name in flat[arm]))
    differ = [n for n in names if len({json.dumps(flat[arm].get(n, "-")) for arm in comparison.arms}) > 1]
    differ = [n for n in differ if n not in ("name", "out")]
    head = ["", *(_name(comparison, arm) for arm in comparison.arms)]
    lines = [[escape(n), *(escape(_leaf(flat[arm].get(n, ""))) for arm in comparison.arms)] for n in differ]
    table = _html_table(head, lines) if differ else ""
    whole = "".join(
        f"<details><summary>{_name(comparison, arm)}</summary>"
        f"<pre>{escape(json.dumps(comparison.configs[arm], indent=2, ensure_ascii=False))}</pre></details>"
        for arm in comparison.arms
    )
    note = "The table has the fields in which the arms differ. Below it is the whole configuration of each arm."
    return f'<h2>Configurations</h2><p class="note">{note}</p>{table}{whole}'


def _leaf(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _about(comparison: Comparison) -> str:
    facts = {**comparison.about, **{f"setting: {name}": value for name, value in comparison.settings.items()}}
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_leaf(v))}</dd>" for k, v in facts.items())
    dropped = {run.arm: run.dropped for run in comparison.runs if run.dropped}
    note = f"<p>Unreadable records that training left out: {escape(json.dumps(dropped))}</p>" if dropped else ""
    return f'<h2>About this run</h2><dl class="about">{rows}</dl>{note}'
