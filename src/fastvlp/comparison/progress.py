"""Where a comparison stands: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fastvlp.comparison.results import (
    ArmRun,
    Comparison,
    Mark,
    Spent,
    seconds,
    shown,
    spread,
    summarise,
    time_to_quality,
    title,
)


class Display:
    """Use as a context manager. `marks`: scorings of one arm with one seed."""

    def __init__(self, arms: Sequence[str], *, budget_s: float, seeds: int, marks: int, console: Console | None = None):
        self.console = console or Console(file=sys.stderr)
        self.arms, self.budget_s, self.seeds, self.marks = list(arms), budget_s, seeds, marks
        self.trained_s: dict[tuple[str, int], float] = {}
        self.scoring_s: list[float] = []
        self.began = time.monotonic()
        self.printed: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}
        self.bars: Progress | None = None
        if self.console.is_terminal:
            columns = ("{task.description}", "{task.fields[rates]}", "{task.fields[scores]}")
            self.bars = Progress(
                TextColumn(columns[0]),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                *(TextColumn(c) for c in columns[1:]),
                console=self.console,
            )

    def __enter__(self) -> Display:
        if self.bars is not None:
            for arm in self.arms:
                self.tasks[arm] = self.bars.add_task(arm, total=1.0, rates="", scores="")
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    @property
    def left_s(self) -> float:
        """Training still to be done, and scorings at their mean cost so far."""
        whole = len(self.arms) * self.seeds
        scoring = sum(self.scoring_s) / len(self.scoring_s) if self.scoring_s else 0.0
        training = whole * self.budget_s - sum(self.trained_s.values())
        return max(training, 0.0) + scoring * (whole * self.marks - len(self.scoring_s))

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def trained(self, run: ArmRun, spent: Spent) -> None:
        self.trained_s[run.arm, run.seed] = min(spent.time, self.budget_s)
        share = spent.time / self.budget_s
        time_s = max(spent.time, 1e-9)
        rates = f"{spent.pairs / time_s:,.0f} pairs/s  {spent.tokens / time_s:,.0f} predicted tokens/s"
        if self.bars is not None:
            name = f"{run.arm} seed {run.seed}"
            left = f"{seconds(round(self.left_s))} left in all"
            self.bars.update(self.tasks[run.arm], completed=min(share, 1.0), description=name, rates=f"{rates}  {left}")
        elif time.monotonic() - self.printed.get(run.arm, self.began) > 30:
            self.printed[run.arm] = time.monotonic()
            self.note(f"{run.arm} seed {run.seed}: {share:.0%}  {rates}  about {seconds(round(self.left_s))} left")

    def scored(self, run: ArmRun, mark: Mark) -> None:
        self.scoring_s.append(mark.scoring_s)
        scores = "  ".join(f"{title(name).title} {shown(name, spread([value]))}" for name, value in mark.scores.items())
        if self.bars is not None:
            self.bars.update(self.tasks[run.arm], scores=scores)
        else:
            at = f"{mark.share:.0%} of the time, {mark.spent.steps} steps, {mark.spent.pairs} pairs"
            took = f"(scored in {seconds(mark.scoring_s)}, about {seconds(round(self.left_s))} left)"
            self.note(f"{run.arm} seed {run.seed}: {at}: {scores} {took}")


def print_tables(comparison: Comparison, console: Console) -> None:
    """What each arm did with its time, and a table of scores for each yardstick."""
    rows = summarise(comparison)
    speed = Table("arm", "steps", "pairs", "pairs/s", "predicted tokens/s", "data wait", "CPU s/s")
    speed.title = f"{seconds(comparison.budget_s)} of training each, seeds: {comparison.seeds}"
    for column in speed.columns[1:]:
        column.justify = "right"
    for row in rows:
        numbers = (row.steps, row.pairs, row.pairs_per_s, row.tokens_per_s)
        speed.add_row(row.arm, *(f"{n:,.0f}" for n in numbers), f"{row.wait:.0%}", f"{row.cpu:.2f}")
    console.print(speed)
    for name in comparison.yardsticks:
        table = Table(
            "arm", caption=f"time-to-quality: how many times as fast to the final score of {comparison.reference}"
        )
        table.title = f"{title(name).title}, {title(name).note}".rstrip(", ")
        for share in comparison.shares:
            table.add_column(seconds(share * comparison.budget_s), justify="right")
        table.add_column("time-to-quality", justify="right")
        for row in rows:
            cells = [shown(name, score) for score in row.scores[name]]
            table.add_row(row.arm, *cells, time_to_quality(comparison, row.arm, name))
        console.print(table)
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.arm}, {failure}", markup=False)
