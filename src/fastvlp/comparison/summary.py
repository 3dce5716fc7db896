"""Summaries of a comparison: means over seeds, time to reach a score, and numbers written for people to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastvlp.comparison.metrics.interface import Score, known_scores
from fastvlp.comparison.results import ArmRun, Comparison, Measurement, TrainingCost
from fastvlp.provenance import other_code


class Spread(NamedTuple):
    """Mean and sample standard deviation over n seeds; the deviation of one seed is 0. `error`: standard error of a single run,
    over the scored items; 0 if it is not known."""

    mean: float
    deviation: float
    n: int
    error: float = 0.0

    @property
    def standard_error(self) -> float:
        """The standard error of the mean over seeds; for a single run, of the mean over its items."""
        return self.deviation / math.sqrt(self.n) if self.n > 1 else self.error


def spread(values: Sequence[float], error: float | None = None) -> Spread | None:
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, len(values), error or 0.0)


def within_noise(a: Spread, b: Spread) -> bool:
    """Whether two means differ by at most two standard errors of their difference. True for single runs whose error is not
    known."""
    if any(one.n == 1 and not one.error for one in (a, b)):
        return True
    return abs(a.mean - b.mean) <= 2 * math.hypot(a.standard_error, b.standard_error)


def measured_scores(comparison: Comparison) -> list[Score]:
    """Returns the scores that any arm has, in the order of the report; scores of unknown metrics come last."""
    names = {name for run in comparison.runs for mark in run.marks for name in mark.scores}
    known = known_scores()
    unknown = [Score(name=name, title=name) for name in sorted(names - set(known))]
    return [score for name, score in known.items() if name in names] + unknown


def known_score(name: str) -> Score:
    """Returns the score of this name. If no known metric measures it, its title is its name."""
    return known_scores().get(name) or Score(name=name, title=name)


class Reached(NamedTuple):
    """Training seconds at which a score was reached. `at_first`: whether this was the first measurement; it may then have been
    reached earlier."""

    time: float
    at_first: bool


def first_reached(times: Sequence[float], scores: Sequence[float], target: float) -> Reached | None:
    """Returns the first time at which the curve, which is linear between its measurements, reaches `target`; None if it never
    does."""
    for i, (time, score) in enumerate(zip(times, scores)):
        if score >= target:
            if i == 0:
                return Reached(time, True)
            share = (target - scores[i - 1]) / (score - scores[i - 1])
            return Reached(times[i - 1] + share * (time - times[i - 1]), False)
    return None


def time_to_score(run: ArmRun, score: str, target: float) -> Reached | None:
    scored = [mark for mark in run.marks if score in mark.scores]
    return first_reached([m.spent.time for m in scored], [m.scores[score] for m in scored], target)


class Speedup(NamedTuple):
    """The ratio of the times at which the reference and an arm reach the final score of the reference.

    Attributes:
        ratio: the reference's time divided by the arm's, over the seeds in which the arm reached the score.
        at_least: whether, in some seed, the arm had reached the score at its first measurement, so that the ratio may be
            higher.
        reached: number of seeds in which the arm reached the score.
        n: number of seeds that can be timed.
        shares: the arm's time divided by the reference's, for each seed in which it reached the score.
        interval: for a single run, the lowest and the highest share if the scores are wrong by two standard errors of their
            difference; there is no highest share if the arm would then not reach the score. None if errors are not known.
    """

    ratio: Spread | None
    at_least: bool
    reached: int
    n: int
    shares: tuple[float, ...] = ()
    interval: tuple[float, float | None] | None = None

    @property
    def range(self) -> tuple[float, float | None] | None:
        """Returns the lowest and the highest share: over seeds, or for a single run by the errors of its scores."""
        return (min(self.shares), max(self.shares)) if len(self.shares) > 1 else self.interval

    def __str__(self) -> str:
        if self.ratio is None:
            return "not reached" if self.n else "-"
        bound = "≥ " if self.at_least else ""
        some = f" ({self.reached} of {self.n} seeds)" if self.reached < self.n else ""
        return f"{bound}{self.ratio.mean:.2f}{f' ± {self.ratio.deviation:.2f}' if self.ratio.n > 1 else ''}×{some}"


def speedup(comparison: Comparison, arm: str, score: str) -> Speedup:
    """Returns how much sooner `arm` reaches the final score of the reference, for each seed.

    For both arms, the first time at which the curve reaches the score counts, so the reference itself has ratio 1. A seed in
    which the reference already has its final score at the first measurement cannot be timed, and is left out.
    """
    references = {run.seed: run for run in comparison.runs_of(comparison.reference)}
    ratios, at_least, n, interval = [], False, 0, None
    for run in comparison.runs_of(arm):
        reference = references.get(run.seed)
        finals = [mark.scores[score] for mark in reference.marks if score in mark.scores] if reference else []
        if reference is None or not finals or not any(score in mark.scores for mark in run.marks):
            continue
        own, theirs = time_to_score(run, score, finals[-1]), time_to_score(reference, score, finals[-1])
        if theirs is None or theirs.at_first:
            continue
        n += 1
        if own:
            ratios.append(theirs.time / own.time)
            at_least |= own.at_first
            interval = interval_of_time(run, reference, score, theirs.time)
    shares = tuple(1 / ratio for ratio in ratios)
    return Speedup(spread(ratios), at_least, len(ratios), n, shares, interval if n == 1 else None)


def interval_of_time(
    run: ArmRun, reference: ArmRun, score: str, reference_time: float
) -> tuple[float, float | None] | None:
    """Returns the earliest and the latest time at which the arm may reach the final score of the reference, as shares of the
    reference's time: its curve is moved up and down by two standard errors of the difference. None if these are not known."""
    scored = [mark for mark in run.marks if score in mark.scores]
    last = [mark for mark in reference.marks if score in mark.scores][-1]
    if score not in last.errors or any(score not in mark.errors for mark in scored):
        return None
    times = [mark.spent.time for mark in scored]
    around = [2 * math.hypot(mark.errors[score], last.errors[score]) for mark in scored]
    values, target = [mark.scores[score] for mark in scored], last.scores[score]
    low, high = (
        first_reached(times, [value + sign * width for value, width in zip(values, around)], target) for sign in (1, -1)
    )
    assert low is not None, "the curve without the errors reaches it"
    return low.time / reference_time, high.time / reference_time if high else None


def format_speedup(comparison: Comparison, arm: str, score: str) -> str:
    """Returns a cell of the table: the arm's speed-up; 1 for the reference itself, if it has the score."""
    scored = any(score in mark.scores for run in comparison.runs_of(arm) for mark in run.marks)
    return "1" if arm == comparison.reference and scored else str(speedup(comparison, arm, score))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One arm over all its seeds.

    Attributes:
        steps: optimiser steps. This and the following attributes are means over seeds at the last measurement.
        wait: share of the training time that was spent waiting for data.
        cpu: CPU seconds for each wall second of training.
        scoring_s: wall seconds in all scorings of a run.
        scores: by score, the spread at each share of the budget; None if it was not measured.
        failures: a line for each seed that failed.
    """

    arm: str
    steps: float
    pairs: float
    pairs_per_s: float
    tokens_per_s: float
    wait: float
    cpu: float
    scoring_s: float
    scores: dict[str, list[Spread | None]]
    speedups: dict[str, Speedup]
    failures: list[str]

    def final(self, score: str) -> Spread | None:
        """Returns the last measurement of a score."""
        return next((s for s in reversed(self.scores[score]) if s), None)


def summarise(comparison: Comparison) -> list[Summary]:
    """Returns a summary of each arm."""
    names = [score.name for score in measured_scores(comparison)]
    rows = []
    for arm in comparison.arms:
        runs = comparison.runs_of(arm)
        last = [run.marks[-1].spent for run in runs if run.marks] or [TrainingCost()]
        time = max(sum(s.time for s in last), 1e-9)
        wall = max(sum(s.wall or s.time for s in last), 1e-9)
        scores = {
            name: [
                measured(
                    [m for run in runs for m in run.marks if m.share == share and name in m.scores],
                    name,
                )
                for share in comparison.shares
            ]
            for name in names
        }
        rows.append(
            Summary(
                arm=arm,
                steps=statistics.fmean(s.steps for s in last),
                pairs=statistics.fmean(s.pairs for s in last),
                pairs_per_s=sum(s.pairs for s in last) / time,
                tokens_per_s=sum(s.tokens for s in last) / time,
                wait=sum(s.wait for s in last) / wall,
                cpu=sum(s.cpu for s in last) / wall,
                scoring_s=sum(mark.scoring_s for run in runs for mark in run.marks) / max(1, len(runs)),
                scores=scores,
                speedups={name: speedup(comparison, arm, name) for name in names},
                failures=[f"seed {run.seed}: {run.failure}" for run in runs if run.failure],
            )
        )
    return rows


def shown_marks(comparison: Comparison) -> list[int]:
    """Returns the marks that a table shows: only some of them if there are many, so that the table fits."""
    few = len(comparison.shares) <= 4
    return [i for i, share in enumerate(comparison.shares) if few or 4 * share % 1 == 0]


def measured(marks: Sequence[Measurement], name: str) -> Spread | None:
    """Returns the spread of a score over the marks of several seeds."""
    errors = [mark.errors.get(name) for mark in marks]
    return spread([mark.scores[name] for mark in marks], errors[0] if len(errors) == 1 else None)


def busy_note(comparison: Comparison) -> str | None:
    """Returns a sentence that names the arms that got less than four fifths of a core; None if all had more, or if wall time
    counts."""
    if comparison.clock != "cpu":
        return None
    busy = []
    for arm in comparison.arms:
        last = [run.marks[-1].spent for run in comparison.runs_of(arm) if run.marks]
        worked = sum(cost.wall - cost.wait for cost in last)
        share = sum(cost.cpu for cost in last) / worked if worked > 0 else 1.0
        busy += [f"{arm} {share:.2f}"] if share < 0.8 else []
    if not busy:
        return None
    return (
        f"The machine was busy: of a core's time the arms got {', '.join(busy)}. Budgets count CPU time, so that this is fair "
        f"to all arms; it took longer."
    )


def added_note(comparison: Comparison) -> str | None:
    """Returns a sentence that names the arms that were added after the others were finished; None if none was."""
    if not comparison.added:
        return None
    when = ", ".join(f"{arm} was added later ({about.get('date', '')})" for arm, about in comparison.added.items())
    return f"{when}: turns of added arms are not between those of the others, so a busy machine may have slowed either alone."


def code_note(comparison: Comparison) -> str | None:
    """Returns a sentence about parts that were measured with another commit or version; None if all parts were measured with
    the same one."""
    changes = []
    for later in (*comparison.continued, *comparison.added.values()):
        if changed := other_code(comparison.about, later):
            words = ", ".join(f"{name} {now}, not {then}" for name, (then, now) in changed.items())
            changes.append(f"{later.get('date', '')}: {words}")
    if not changes:
        return None
    return f"Not all was measured with the same code ({'; '.join(dict.fromkeys(changes))}): a difference may be due to that."


def format_score(score: Score, value: Spread | None) -> str:
    """Writes a score for readers: in per cent if it is a share, with its deviation over several seeds, or with the standard
    error of a single run."""
    if value is None:
        return "-"
    scale, digits = (100, 1) if score.percent else (1, 3)
    around = value.deviation if value.n > 1 else value.error
    deviation = f" ± {around * scale:.{digits}f}" if value.n > 1 or around else ""
    return f"{value.mean * scale:.{digits}f}{deviation}{' %' if score.percent else ''}"


def format_length(comparison: Comparison, share: float = 1.0) -> str:
    """Writes a share of the budget for readers, in the unit of the budget."""
    length = share * comparison.budget_s
    return f"{length:,.0f} steps" if comparison.counted == "steps" else format_duration(length)


def format_duration(seconds: float) -> str:
    """Writes a time for readers: 45 s, 2 min, 1.5 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def exact_duration(seconds: float) -> str:
    """Writes a time like `format_duration`, but in a unit in which nothing is rounded: 99 s, 20 min, 2.5 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size and 2 * seconds % size == 0:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:.15g} s"
