"""Training the arms of a comparison by turns, on one device.

The arms of one seed train a few seconds each in turn, so that whatever else the machine does slows all of them alike. After
given shares of the budget each arm is scored, which costs none of its training time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, cast

import torch

from fastvlp.comparison.progress import ProgressDisplay
from fastvlp.comparison.report import write_report
from fastvlp.comparison.results import ArmRun, Comparison, LossPoint, Measurement, Sample, Scored, TrainingCost
from fastvlp.config import to_json
from fastvlp.dist import pick_device
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import save_config, save_weights
from fastvlp.training.loop import start, steps
from fastvlp.training.state import StepReport, TrainState
from fastvlp.training.train_config import TrainConfig

EIGHTHS = tuple(i / 8 for i in range(1, 9))
# Points of each training-loss curve.
CURVE_POINTS = 120


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When each arm trains, and when it is scored.

    Attributes:
        budget_s: training seconds of each arm and seed.
        out: folder of results.json, report.html and the runs.
        seeds: runs of each arm, with consecutive seeds.
        marks: shares of the budget after which the arms are scored; the end is always one of them.
        tuned_marks: those after which a copy is fine-tuned for a score, too; the end is always one of them.
        slice_s: seconds of one turn.
    """

    budget_s: float
    out: Path
    seeds: int = 1
    marks: tuple[float, ...] = EIGHTHS
    tuned_marks: tuple[float, ...] = (1.0,)
    slice_s: float = 5.0

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.slice_s <= 0:
            raise UserError("`budget` and `slice` must be times above 0, such as 120s or 20m")
        if self.seeds < 1:
            raise UserError(f"`seeds` must be at least 1, not {self.seeds}")
        for name, marks in (("marks", self.marks), ("tuned_marks", self.tuned_marks)):
            if not all(0 < mark <= 1 for mark in marks):
                raise UserError(f"`{name}` must be shares of the budget, above 0 and up to 1, not {marks}")

    @property
    def shares(self) -> list[float]:
        return sorted({*self.marks, *self.tuned_marks, 1.0})


class Scorer(Protocol):
    """Scores the arms, without changing their states. `options`: a dataclass, for the report."""

    @property
    def options(self) -> Any: ...

    def check(self, state: TrainState) -> None:
        """Reads all that is scored once, before the first step. Raises UserError where something cannot be read."""

    def score(self, state: TrainState, *, tuned: bool = True) -> Scored:
        """The scores of an arm; without `tuned` those for which nothing is fine-tuned."""

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """Pictures with the captions and answers of each arm; called right after the last scores."""


def keep_weights(state: TrainState) -> None:
    save_config(state)
    save_weights(state, "last")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The functions with which an arm is begun, trained step by step, and kept at its end."""

    begin: Callable[[TrainConfig], TrainState] = start
    iterate: Callable[[TrainState], Iterator[StepReport]] = steps
    keep: Callable[[TrainState], None] = keep_weights


TRAINING = Training()


def budget_clock(device: torch.device) -> float:
    """Seconds by which a budget is counted. On a CPU, CPU seconds of this process, all its threads together, so that a busy
    machine gives each arm as much work as a free one; elsewhere wall seconds."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@dataclass(kw_only=True)
class ArmTraining:
    """The training of one arm with one seed, which can be interrupted after each step.

    Attributes:
        reports: the training loop; each step is run by asking for its report.
        shares: shares of the budget after which the arm is scored.
        spent: what the training took so far.
        ended: the loop has run its last step.
        recent: losses of the steps since the last point of the curve.
    """

    state: TrainState
    reports: Iterator[StepReport]
    run: ArmRun
    shares: Sequence[float]
    budget_s: float
    spent: TrainingCost = field(default_factory=TrainingCost)
    ended: bool = False
    recent: list[dict[str, float]] = field(default_factory=list)

    @property
    def next_scoring(self) -> float:
        """Training seconds after which the arm is scored next."""
        return self.next_share * self.budget_s

    @property
    def due(self) -> bool:
        """Whether the arm has to be scored now."""
        return not self.done and (self.ended or self.spent.time >= self.next_scoring)

    @property
    def done(self) -> bool:
        return len(self.run.marks) == len(self.shares) or self.run.failure is not None

    def train(self, slice_s: float) -> None:
        """Trains for a turn: at least one step, and at most until the next scoring. Only time inside the steps counts."""
        until = min(self.spent.time + slice_s, self.next_scoring)
        while not self.ended and self.spent.time < until:
            self._step(until)

    def _step(self, until: float) -> None:
        wall, cpu, began = time.perf_counter(), time.process_time(), budget_clock(self.state.device)
        report = next(self.reports, None)
        before = self.spent
        last = report is None or before.time + budget_clock(self.state.device) - began >= until
        if last and self.state.device.type == "cuda":
            # Work that is still queued belongs to this arm and not to the next one.
            torch.cuda.synchronize(self.state.device)
        self.spent = TrainingCost(
            time=before.time + budget_clock(self.state.device) - began,
            wall=before.wall + time.perf_counter() - wall,
            cpu=before.cpu + time.process_time() - cpu,
            wait=before.wait + (report.data_wait if report else 0.0),
            steps=self.state.step,
            pairs=self.state.pairs,
            tokens=self.state.tokens,
        )
        if report is None:
            self.ended = True
        else:
            self._record(report)

    def _record(self, report: StepReport) -> None:
        if not report.skipped:
            self.recent.append(report.losses)
        if self.recent and len(self.run.curve) <= self.spent.time / self.budget_s * CURVE_POINTS:
            terms = [name for name in report.losses if name != "loss"]
            losses = {name: fmean(step[name] for step in self.recent) for name in terms}
            self.run.curve.append(LossPoint(spent=self.spent, losses=losses))
            self.recent.clear()

    @property
    def next_share(self) -> float:
        """The share of the budget after which it is scored next."""
        return self.shares[len(self.run.marks)]

    def add_scores(self, scored: Scored, scoring_s: float) -> None:
        self.run.marks.append(
            Measurement(
                share=self.next_share, spent=self.spent, scores=scored.values, errors=scored.errors, scoring_s=scoring_s
            )
        )
        self.run.dropped = len(self.state.dropped)


def run_comparison(
    plan: Plan,
    arms: Mapping[str, TrainConfig],
    *,
    reference: str,
    about: dict[str, Any],
    scorer: Scorer,
    display: ProgressDisplay,
    training: Training = TRAINING,
) -> Comparison:
    """Trains and scores every arm with every seed.

    results.json and report.html are complete after every scoring, and the weights of each arm are in runs/ARM-SEED, as those
    of a run, before it is scored.
    """
    comparison = Comparison(
        arms=list(arms),
        reference=reference,
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        shares=plan.shares,
        about=about,
        settings={k: v for k, v in asdict(plan).items() if k != "out"} | asdict(scorer.options),
        configs={arm: cast(dict[str, Any], to_json(run)) for arm, run in arms.items()},
        folder=plan.out,
        finished=False,
        clock="cpu" if device_of(arms).type == "cpu" else "wall",
    )
    save(comparison)
    for seed in range(plan.seeds):
        started = []
        for arm, config in arms.items():
            display.note(f"seed {seed}: building {arm}")
            state = training.begin(replace(config, seed=config.seed + seed, out=f"{config.out}-{config.seed + seed}"))
            state.clock = partial(budget_clock, state.device)
            scorer.check(state)
            run = ArmRun(arm=arm, seed=state.run.seed)
            comparison.runs.append(run)
            reports = training.iterate(state)
            started.append(
                ArmTraining(state=state, reports=reports, run=run, shares=plan.shares, budget_s=plan.budget_s)
            )
        take_turns(started, plan, comparison, scorer, display, training.keep)
        if seed == 0:
            add_samples(comparison, {arm.run.arm: arm.state for arm in started if not arm.run.failure}, scorer, display)
    comparison.finished = True
    save(comparison)
    return comparison


def device_of(arms: Mapping[str, TrainConfig]) -> torch.device:
    """Where the arms train."""
    return pick_device(next(iter(arms.values())).device)


def add_samples(
    comparison: Comparison, states: Mapping[str, TrainState], scorer: Scorer, display: ProgressDisplay
) -> None:
    """Adds pictures with captions and answers to the report, which is whole without them."""
    try:
        comparison.samples = scorer.samples(states)
    except UserError as error:
        display.note(f"no captions and answers: {error}")
    save(comparison)


def save(comparison: Comparison) -> None:
    """Writes results.json and report.html into the comparison's folder."""
    folder = comparison.folder or Path()
    comparison.save(folder / "results.json")
    write_report(comparison, folder / "report.html")


def take_turns(
    arms: Sequence[ArmTraining],
    plan: Plan,
    comparison: Comparison,
    scorer: Scorer,
    display: ProgressDisplay,
    keep: Callable[[TrainState], None],
) -> None:
    """Gives the arms turns until all are done. The order rotates, so that no arm always follows the same one."""
    turn = 0
    while any(not arm.done for arm in arms):
        first = turn % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            if not arm.done:
                _take_turn(arm, plan, comparison, scorer, display, keep)
        turn += 1


def _take_turn(
    arm: ArmTraining,
    plan: Plan,
    comparison: Comparison,
    scorer: Scorer,
    display: ProgressDisplay,
    keep: Callable[[TrainState], None],
) -> None:
    try:
        arm.train(plan.slice_s)
        display.trained(arm.run, arm.spent)
        if arm.due:
            keep(arm.state)
        while arm.due:
            display.scoring(arm.run, arm.next_share)
            began, tuned = time.perf_counter(), arm.next_share in {*plan.tuned_marks, 1.0}
            scored = scorer.score(arm.state, tuned=tuned)
            arm.add_scores(scored, time.perf_counter() - began)
            comparison.chance |= scored.chance
            comparison.blind |= scored.blind
            display.scored(arm.run, arm.run.marks[-1], tuned=tuned)
            save(comparison)
    except UserError as error:
        # An arm that diverges, in its training or in the fine-tuning before a score, is a result; the others go on.
        arm.run.failure = str(error)
        display.note(f"{arm.run.arm}: {error}")
        save(comparison)
