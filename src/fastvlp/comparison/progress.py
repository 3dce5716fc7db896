"""The progress of a comparison on the terminal: bars, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fastvlp.comparison.findings import findings
from fastvlp.comparison.metrics.interface import Score
from fastvlp.comparison.results import ArmRun, Comparison, Measurement, TrainingCost
from fastvlp.comparison.summary import (
    Summary,
    added_note,
    busy_note,
    code_note,
    format_duration,
    format_length,
    format_score,
    format_speedup,
    known_score,
    measured_scores,
    shown_marks,
    spread,
    summarise,
)

# Seconds between two lines about the same arm where the output is no terminal.
QUIET_S = 30
# Turns over which the pace of the training is averaged: a machine may become busy.
RECENT = 16
# Time for a row of a fine-tuning, a question say, over that for a pair of the fastest arm (docs/log.md, entries 37 and 41).
ROW_TO_PAIR = 0.75


class ProgressDisplay:
    """Prints where a comparison is; a context manager.

    Args:
        scorings: how often an arm is scored with one seed.
        tuned_scorings: how many of these a copy is fine-tuned for.
        tuning_rows: rows of the fine-tuning before a score, by which its time is guessed until the first one is over.
        console: standard error by default.
    """

    def __init__(
        self,
        arms: Sequence[str],
        *,
        budget_s: float,
        seeds: int,
        scorings: int,
        tuned_scorings: int = 1,
        tuning_rows: int = 0,
        console: Console | None = None,
    ):
        self.console = console or Console(file=sys.stderr)
        self.arms, self.budget_s, self.seeds, self.scorings = list(arms), budget_s, seeds, scorings
        self.tuned_scorings, self.tuning_rows = tuned_scorings, tuning_rows
        self.trained_s: dict[tuple[str, int], float] = {}
        self.spent: dict[tuple[str, int], TrainingCost] = {}
        self.turns: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.tuning_s: list[float] = []
        self.scoring_s: list[float] = []
        self.began = time.monotonic()
        self.printed: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}
        self.bars: Progress | None = None
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[rates]}"),
                TextColumn("{task.fields[scores]}"),
                console=self.console,
            )

    def __enter__(self) -> ProgressDisplay:
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
    def pace(self) -> float:
        """Wall seconds for each second of the budget in the last turns: a busy machine takes more for the same work."""
        return (
            sum(wall for _, wall in self.turns) / max(sum(time for time, _ in self.turns), 1e-9) if self.turns else 1.0
        )

    @property
    def left_s(self) -> float:
        """Seconds left: the rest of the training at its recent pace, and the scorings at their mean times."""
        runs = len(self.arms) * self.seeds
        mean = sum(self.scoring_s) / len(self.scoring_s) if self.scoring_s else 0.0
        tuning = sum(self.tuning_s) / len(self.tuning_s) if self.tuning_s else self._guessed_tuning_s + mean
        training = runs * self.budget_s - sum(self.trained_s.values())
        cheap = max(0, runs * (self.scorings - self.tuned_scorings) - len(self.scoring_s))
        tuned = max(0, runs * self.tuned_scorings - len(self.tuning_s))
        return max(training, 0.0) * self.pace + mean * cheap + tuning * tuned

    @property
    def _guessed_tuning_s(self) -> float:
        """Wall seconds of a fine-tuning, before the first: for each row a share of what the fastest arm takes for a pair."""
        a_pair = [spent.wall / spent.pairs for spent in self.spent.values() if spent.wall and spent.pairs]
        return (
            self.tuning_rows * ROW_TO_PAIR * min(a_pair)
            if self.tuning_rows and a_pair
            else self.budget_s * self.pace / 4
        )

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def known(self, run: ArmRun, tuned: Sequence[bool]) -> None:
        """Counts what was done before the comparison was continued. `tuned`: for each mark, whether a copy was fine-tuned."""
        share = 1.0 if run.failure is not None else max((mark.share for mark in run.marks), default=0.0)
        self.trained_s[run.arm, run.seed] = share * self.budget_s
        if run.marks:
            self.spent[run.arm, run.seed] = run.marks[-1].spent
        for mark, was_tuned in zip(run.marks, tuned):
            (self.tuning_s if was_tuned else self.scoring_s).append(mark.scoring_s)

    def trained(self, run: ArmRun, spent: TrainingCost, used: float) -> None:
        """Shows an arm after a turn. `used`: how much of the budget it has spent."""
        key = run.arm, run.seed
        before = self.spent.get(key, TrainingCost())
        wall = (spent.wall or spent.time) - (before.wall or before.time)
        self.turns.append((used - self.trained_s.get(key, 0.0), wall))
        self.spent[key] = spent
        self.trained_s[key] = min(used, self.budget_s)
        share = used / self.budget_s
        time_s = max(spent.time, 1e-9)
        rates = f"{spent.pairs / time_s:,.0f} pairs/s  {spent.tokens / time_s:,.0f} predicted tokens/s"
        left = f"about {format_duration(round(self.left_s))} left in all"
        name = f"{run.arm} seed {run.seed}"
        if self.bars is not None:
            self.bars.update(self.tasks[run.arm], completed=min(share, 1.0), description=name, rates=f"{rates}  {left}")
        elif time.monotonic() - self.printed.get(run.arm, self.began) > QUIET_S:
            self.printed[run.arm] = time.monotonic()
            self.note(f"{name}: {share:.0%}  {rates}  {left}")

    def scoring(self, run: ArmRun, share: float) -> None:
        """Shows that an arm is being scored."""
        if self.bars is not None:
            self.bars.update(self.tasks[run.arm], scores=f"scoring at {share:.0%}")
        elif share == 1:
            # At the end a copy is fine-tuned, which may take as long as the training.
            self.note(
                f"{run.arm} seed {run.seed}: last scores  about {format_duration(round(self.left_s))} left in all"
            )

    def scored(self, run: ArmRun, mark: Measurement, *, tuned: bool = True) -> None:
        """Shows the scores of an arm. `tuned`: whether a copy was fine-tuned for them."""
        (self.tuning_s if tuned else self.scoring_s).append(mark.scoring_s)
        known = {name: known_score(name) for name in mark.scores}
        scores = "  ".join(
            f"{known[name].title} {format_score(known[name], spread([value], mark.errors.get(name)))}"
            for name, value in mark.scores.items()
        )
        if self.bars is not None:
            self.bars.update(self.tasks[run.arm], scores=scores)
        else:
            at = f"after {mark.share:.0%} of the time, {mark.spent.steps} steps, {mark.spent.pairs} pairs"
            took = f"(scored in {format_duration(mark.scoring_s)}, about {format_duration(round(self.left_s))} left)"
            self.note(f"{run.arm} seed {run.seed} {at}: {scores} {took}")


def print_tables(comparison: Comparison, console: Console) -> None:
    """Prints how fast each arm trained, a table of each score, and the failures."""
    rows = summarise(comparison)
    speed = Table("arm", "steps", "pairs", "pairs/s", "predicted tokens/s", "waiting for data", "CPU s/s")
    speed.title = f"{format_length(comparison)} of training for each arm, seeds: {comparison.seeds}"
    for column in speed.columns[1:]:
        column.justify = "right"
    for row in rows:
        numbers = (row.steps, row.pairs, row.pairs_per_s, row.tokens_per_s)
        speed.add_row(row.arm, *(f"{n:,.0f}" for n in numbers), f"{row.wait:.0%}", f"{row.cpu:.2f}")
    console.print(speed)
    for score in measured_scores(comparison):
        console.print(score_table(comparison, rows, score))
    for note in filter(None, (busy_note(comparison), added_note(comparison), code_note(comparison))):
        console.print(note, markup=False)
    for row in rows:
        for failure in row.failures:
            console.print(f"{row.arm}, {failure}", markup=False)
    console.print()
    for sentence in findings(comparison):
        console.print(sentence, markup=False, highlight=False, style="bold")


def score_table(comparison: Comparison, rows: Sequence[Summary], score: Score) -> Table:
    """A table of a score at a few marks, with how soon the arms had the final score of the reference."""
    shown = [i for i in shown_marks(comparison) if any(row.scores[score.name][i] for row in rows)]
    timed = any(row.speedups[score.name].n for row in rows)
    title = ", ".join(filter(None, (score.title, score.note, "in per cent" if score.percent else "")))
    lines = [
        f"{name}: {format_score(score, spread([levels[score.name]]))}"
        for name, levels in (("the text alone", comparison.blind), ("chance", comparison.chance))
        if score.name in levels
    ]
    if timed:
        lines.append(f"speed-up: how many times as fast to the final score of {comparison.reference}")
    table = Table("arm", title=title, caption="; ".join(lines) or None)
    for i in shown:
        table.add_column(format_length(comparison, comparison.shares[i]), justify="right")
    if timed:
        table.add_column("speed-up", justify="right")
    for row in rows:
        if row.final(score.name):
            cells = [format_score(score, row.scores[score.name][i]).removesuffix(" %") for i in shown]
            speed = [format_speedup(comparison, row.arm, score.name)] if timed else []
            table.add_row(row.arm, *cells, *speed)
    return table
