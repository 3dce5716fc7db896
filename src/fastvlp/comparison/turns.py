"""Training the arms of a comparison by turns, on one device.

The arms of one seed train a few seconds each in turn, so that whatever else the machine does slows all of them alike. After
given shares of the budget each arm is scored, which costs none of its training time. What was begun is continued from its last
checkpoint, and what is done stays as it is: a comparison that was interrupted is the same call again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fastvlp.comparison.arm_training import ArmTraining, budget_clock
from fastvlp.comparison.continued import check_records
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.progress import ProgressDisplay
from fastvlp.comparison.report import write_report
from fastvlp.comparison.results import ArmRun, Comparison, Sample, Scored
from fastvlp.comparison.samples import merged
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import CHECKPOINT, check_finite, save_config
from fastvlp.training.checkpoint import save as save_state
from fastvlp.training.loop import start, steps
from fastvlp.training.state import StepReport, TrainState
from fastvlp.training.train_config import TrainConfig


class Scorer(Protocol):
    """Scores the arms, without changing their states. `options`: a dataclass, for the report."""

    @property
    def options(self) -> Any: ...

    def check(self, state: TrainState) -> None:
        """Reads all that is scored once, before the first step. Raises UserError if something cannot be read."""

    def score(self, state: TrainState, *, tuned: bool = True) -> Scored:
        """The scores of an arm; without `tuned` those for which nothing is fine-tuned."""

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """Pictures with the captions and answers of each arm."""


def begin(config: TrainConfig, *, resume: bool) -> TrainState:
    """An arm at its beginning, or where its last checkpoint stands. What an earlier comparison left in its folder counts for
    nothing."""
    if not resume:
        forget(config.folder)
    return start(config, resume=resume)


def keep(state: TrainState) -> None:
    """Saves all that an arm continues from, and its weights alone."""
    if not state.saved:
        save_config(state)
    save_state(state)


def is_kept(folder: Path) -> bool:
    """Whether an arm has a state that it continues from."""
    return (folder / CHECKPOINT).exists()


def forget(folder: Path) -> None:
    """Removes the state of an arm that is not continued any more; its weights stay."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The functions with which an arm is begun, trained step by step, checked before it is saved, saved, and left alone; and
    whether it has been saved."""

    begin: Callable[..., TrainState] = begin
    iterate: Callable[[TrainState], Iterator[StepReport]] = steps
    check: Callable[[TrainState], None] = check_finite
    keep: Callable[[TrainState], None] = keep
    is_kept: Callable[[Path], bool] = is_kept
    forget: Callable[[Path], None] = forget


TRAINING = Training()


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The data and options that the turns of all arms share."""

    plan: Plan
    arms: Mapping[str, TrainConfig]
    comparison: Comparison
    scorer: Scorer
    display: ProgressDisplay
    training: Training = TRAINING

    def save(self) -> None:
        save(self.comparison)


def run_comparison(
    plan: Plan,
    arms: Mapping[str, TrainConfig],
    *,
    comparison: Comparison,
    scorer: Scorer,
    display: ProgressDisplay,
    training: Training = TRAINING,
) -> Comparison:
    """Trains and scores every arm with every seed, as far as it is not done in `comparison`, and returns that.

    results.json and report.html are complete after every scoring. The state of each arm is in runs/ARM-SEED, as that of a run,
    before it is scored; once the arms of a seed are done, only their weights stay.
    """
    turns = Turns(plan=plan, arms=arms, comparison=comparison, scorer=scorer, display=display, training=training)
    comparison.finished = False
    for run in comparison.runs:
        display.known(run, [plan.tunes_at(mark.share) for mark in run.marks])
    for seed in range(plan.seeds):
        train_seed(turns, seed)
    comparison.finished = True
    turns.save()
    return comparison


def train_seed(turns: Turns, seed: int) -> None:
    """Trains and scores the arms with one seed; with the first one, they are also asked for captions and answers."""
    configs = {arm: seeded(config, seed) for arm, config in turns.arms.items()}
    started = [begin_arm(turns, arm, config) for arm, config in configs.items() if is_open(turns, arm, config, seed)]
    # From here on each of them is continued and not begun anew.
    turns.save()
    take_turns(turns, started)
    if seed == 0 and started:
        add_samples(turns, {arm.run.arm: arm.state for arm in started if not arm.run.failure})
    for config in configs.values():
        turns.training.forget(config.folder)


def seeded(config: TrainConfig, seed: int) -> TrainConfig:
    """The config of an arm with one of its seeds, in a folder of its own."""
    number = config.seed + seed
    return replace(config, seed=number, out=f"{config.out}-{number}")


def is_open(turns: Turns, arm: str, config: TrainConfig, seed: int) -> bool:
    """Whether something of an arm with one seed is missing: scores, or its captions and answers."""
    run = turns.comparison.run_of(arm, config.seed)
    if run is None or not run.is_done(turns.plan.shares):
        return True
    return seed == 0 and run.failure is None and arm not in turns.comparison.sampled


def begin_arm(turns: Turns, arm: str, config: TrainConfig) -> ArmTraining:
    """An arm with one seed, at its beginning or where its last checkpoint stands."""
    plan, comparison = turns.plan, turns.comparison
    run = comparison.run_of(arm, config.seed)
    # An arm may be in the results without having trained: that of a comparison which ended before its first turn was saved.
    begun = run is not None and turns.training.is_kept(config.folder)
    turns.display.note(f"seed {config.seed}: {'continuing' if begun else 'building'} {arm}")
    state = turns.training.begin(config, resume=run is not None)
    state.clock = partial(budget_clock, state.device)
    turns.scorer.check(state)
    if run is None:
        run = ArmRun(arm=arm, seed=config.seed, contents=dict(state.contents))
        check_records(comparison, run)
        comparison.runs.append(run)
    reports = turns.training.iterate(state)
    training = ArmTraining(
        state=state, reports=reports, run=run, shares=plan.shares, budget_s=plan.budget_s, by_steps=plan.steps
    )
    training.take_up(state.notes)
    return training


def add_samples(turns: Turns, states: Mapping[str, TrainState]) -> None:
    """Adds pictures with captions and answers to the report, which is whole without them."""
    comparison = turns.comparison
    try:
        comparison.samples = merged(comparison.samples, turns.scorer.samples(states))
    except UserError as error:
        turns.display.note(f"no captions and answers: {error}")
    comparison.sampled = list(dict.fromkeys([*comparison.sampled, *states]))
    turns.save()


def save(comparison: Comparison) -> None:
    """Writes results.json and report.html into the comparison's folder."""
    folder = comparison.folder or Path()
    comparison.save(folder / "results.json")
    write_report(comparison, folder / "report.html")


def take_turns(turns: Turns, arms: Sequence[ArmTraining]) -> None:
    """Gives the arms turns until all are done. The order rotates, so that no arm always follows the same one."""
    turn = 0
    while any(not arm.done for arm in arms):
        first = turn % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            if not arm.done:
                take_turn(turns, arm)
        turn += 1


def take_turn(turns: Turns, arm: ArmTraining) -> None:
    """Trains an arm for a turn, saves it and scores it, where either is due."""
    try:
        arm.train(turns.plan.slice_s)
        turns.training.check(arm.state)
    except UserError as error:
        fail(turns, arm, error)
        turns.save()
        return
    turns.display.trained(arm.run, arm.spent, arm.used)
    if arm.due or arm.save_due:
        # Not a failure of the arm: where the disk is full, the comparison ends here and is continued later.
        keep_arm(turns, arm)
    while arm.due:
        try:
            score(turns, arm)
        except UserError as error:
            fail(turns, arm, error)
        turns.save()


def keep_arm(turns: Turns, arm: ArmTraining) -> None:
    """Saves an arm and its account in one file, outside of its training time."""
    began = time.monotonic()
    arm.state.notes = arm.notes()
    turns.training.keep(arm.state)
    arm.saved_at = time.monotonic()
    arm.saving_s = arm.saved_at - began


def score(turns: Turns, arm: ArmTraining) -> None:
    turns.display.scoring(arm.run, arm.next_share)
    began, tuned = time.perf_counter(), turns.plan.tunes_at(arm.next_share)
    scored = turns.scorer.score(arm.state, tuned=tuned)
    arm.add_scores(scored, time.perf_counter() - began)
    turns.comparison.chance |= scored.chance
    turns.comparison.blind |= scored.blind
    turns.comparison.images |= scored.images
    turns.display.scored(arm.run, arm.run.marks[-1], tuned=tuned)


def fail(turns: Turns, arm: ArmTraining, error: UserError) -> None:
    """An arm that diverges, in its training or in the fine-tuning before a score, is a result; the others go on."""
    arm.run.failure = str(error)
    turns.display.note(f"{arm.run.arm}: {error}")
