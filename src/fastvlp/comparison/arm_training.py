"""The training of one arm with one seed, which can be interrupted after each step and continued in another process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch

from fastvlp.comparison.results import ArmRun, LossPoint, Measurement, Scored, TrainingCost
from fastvlp.config import from_json
from fastvlp.errors import UserError
from fastvlp.training.state import StepReport, TrainState

# Points of each training-loss curve.
CURVE_POINTS = 120
# Seconds between two checkpoints of an arm, and how many times as long as saving they are at least.
SAVE_EVERY_S = 10.0
SAVE_SHARE = 20
# The name of the account among the notes that are saved with a state.
ACCOUNT = "comparison"


def budget_clock(device: torch.device) -> float:
    """Seconds by which a budget is counted. On a CPU, CPU seconds of this process, all its threads together, so that a busy
    machine gives each arm as much work as a free one; elsewhere wall seconds."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Account:
    """The record of an arm's training that is saved with its state.

    Attributes:
        spent: what the training took.
        curve: the training losses.
        recent: losses of the steps since the last point of the curve.
        ended: the loop has run its last step.
    """

    spent: TrainingCost
    curve: list[LossPoint]
    recent: list[dict[str, float]]
    ended: bool


@dataclass(kw_only=True)
class ArmTraining:
    """The training of one arm with one seed.

    Attributes:
        reports: the training loop; each step is run by asking for its report.
        shares: shares of the budget after which the arm is scored.
        by_steps: whether the budget and turns are counted in steps, and not in seconds.
        spent: what the training took so far.
        ended: the loop has run its last step.
        recent: losses of the steps since the last point of the curve.
        saved_at: when it was saved last, in seconds of `time.monotonic`.
        saving_s: how long that took.
    """

    state: TrainState
    reports: Iterator[StepReport]
    run: ArmRun
    shares: Sequence[float]
    budget_s: float
    by_steps: bool = False
    spent: TrainingCost = field(default_factory=TrainingCost)
    ended: bool = False
    recent: list[dict[str, float]] = field(default_factory=list)
    saved_at: float = -math.inf
    saving_s: float = 0.0

    @property
    def used(self) -> float:
        """The part of the budget that is spent, in seconds or steps."""
        return self.spent.steps if self.by_steps else self.spent.time

    @property
    def next_scoring(self) -> float:
        """Training seconds or steps after which the arm is scored next."""
        return self.next_share * self.budget_s

    @property
    def next_share(self) -> float:
        """The share of the budget after which it is scored next."""
        return self.shares[len(self.run.marks)]

    @property
    def due(self) -> bool:
        """Whether the arm has to be scored now."""
        return not self.done and (self.ended or self.used >= self.next_scoring)

    @property
    def done(self) -> bool:
        return self.run.is_done(self.shares)

    @property
    def save_due(self) -> bool:
        """Whether so much time has passed since the last checkpoint that the next one is worth what it takes."""
        return time.monotonic() - self.saved_at >= max(SAVE_EVERY_S, SAVE_SHARE * self.saving_s)

    def train(self, slice_s: float) -> None:
        """Trains for a turn: at least one step, and at most until the next scoring. Only time inside the steps counts.
        `slice_s`: seconds of the turn, or its steps."""
        until = min(self.used + slice_s, self.next_scoring)
        while not self.ended and self.used < until:
            self._step(until)

    def _step(self, until: float) -> None:
        wall, cpu, began = time.perf_counter(), time.process_time(), budget_clock(self.state.device)
        report = next(self.reports, None)
        before = self.spent
        after = self.state.step if self.by_steps else before.time + budget_clock(self.state.device) - began
        if (report is None or after >= until) and self.state.device.type == "cuda":
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
        if self.recent and len(self.run.curve) <= self.used / self.budget_s * CURVE_POINTS:
            terms = [name for name in report.losses if name != "loss"]
            losses = {name: fmean(step[name] for step in self.recent) for name in terms}
            self.run.curve.append(LossPoint(spent=self.spent, losses=losses))
            self.recent.clear()

    def add_scores(self, scored: Scored, scoring_s: float) -> None:
        self.run.marks.append(
            Measurement(
                share=self.next_share, spent=self.spent, scores=scored.values, errors=scored.errors, scoring_s=scoring_s
            )
        )
        self.run.dropped = len(self.state.dropped)

    def notes(self) -> dict[str, Any]:
        """The account, to be saved in one file with the state: each says nothing without the other."""
        account = Account(spent=self.spent, curve=self.run.curve, recent=self.recent, ended=self.ended)
        return {ACCOUNT: asdict(account)}

    def take_up(self, notes: Mapping[str, Any]) -> None:
        """Continues the account that was saved with the state. The scores are those of results.json, which has all that were
        measured: the state is saved before each scoring.

        Raises UserError if the saved state is not that of these scores.
        """
        folder = self.state.run.folder
        marks, remedy = self.run.marks, "put the files back, or start a new comparison in another folder"
        if ACCOUNT not in notes:
            if marks:
                raise UserError(
                    f"{folder}: has no state to continue from, although results.json has its scores; {remedy}"
                )
            self.run.curve = []
            return
        account = from_json(Account, notes[ACCOUNT], str(folder))
        if marks and marks[-1].spent.steps > account.spent.steps:
            raise UserError(
                f"{folder}: was saved after {account.spent.steps} steps, and results.json has scores of "
                f"{marks[-1].spent.steps}; {remedy}"
            )
        self.spent, self.recent, self.ended = account.spent, account.recent, account.ended
        self.run.curve = account.curve
