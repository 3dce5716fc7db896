"""The result of measuring a speed record again, for the terminal."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from fastvlp.comparison.speed_records import MOST_P, SpeedRecord, Verified
from fastvlp.comparison.summary import format_score, known_score, spread


def print_record(verified: Verified, console: Console) -> None:
    """Prints a line for each seed, the test, and how it compares with what the record's file says."""
    record, measured = verified.record, verified.measured
    score = known_score(record.score)
    target = format_score(score, spread([record.target]))
    table = Table("seed", "steps", time_heading(measured), score.title, "at the target after", title=str(verified.file))
    for run in measured.runs:
        took = "never" if run.reached_time is None else f"{run.reached_steps:,.0f} steps, {run.reached_time:,.0f} s"
        final = run.failure or format_score(score, spread([run.final]))
        table.add_row(str(run.seed), f"{run.steps:,}", f"{run.time:,.1f}", final, took)
    console.print(table)
    mean = format_score(score, spread([run.final for run in measured.runs]))
    verdict = "met" if measured.met else "not met"
    p = "-" if measured.p is None else f"{measured.p:.2g}"
    console.print(f"target {target}: {verdict}; mean {mean}, p = {p} (below {MOST_P:g} is needed)", markup=False)
    if record.runs:
        console.print(comparison_line(record, measured), markup=False)
    console.print(f"results: {verified.comparison.folder}", markup=False)


def time_heading(record: SpeedRecord) -> str:
    return "CPU s" if record.track == "cpu2" else "s"


def comparison_line(record: SpeedRecord, measured: SpeedRecord) -> str:
    """Returns a line that compares the new measurement with the record."""
    unit = "steps" if record.track == "steps" else time_heading(record)
    finals = [statistics.fmean(run.final for run in one.runs) for one in (record, measured)]
    line = f"the record: {record.value:,.0f} {unit}, final {finals[0]:.3f}; here {measured.value:,.0f} {unit}, {finals[1]:.3f}"
    if record.track != "steps" and record.device != measured.device:
        line += f"; times of other devices do not compare: {record.device} there, {measured.device} here"
    return line
