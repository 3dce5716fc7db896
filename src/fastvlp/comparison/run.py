"""Several recipes, one budget of training time each, on one device.

The arms of one seed train by turns, a few seconds each, so that whatever else the machine does meets all of them alike;
at marks along the way each is scored on the same yardsticks, which costs none of its time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, cast

import torch
from rich.console import Console

from fastvlp import dist
from fastvlp.comparison.options import Compare
from fastvlp.comparison.overrides import duration, override
from fastvlp.comparison.progress import Display, print_tables
from fastvlp.comparison.report import write_report
from fastvlp.comparison.results import ArmRun, Comparison, LossPoint, Mark, Sample, Spent
from fastvlp.comparison.scoring import Yardsticks
from fastvlp.config import to_json
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import pick_device
from fastvlp.errors import UserError
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.provenance import about
from fastvlp.recipes import names, recipe
from fastvlp.training.loop import StepReport, TrainConfig, TrainState, start, steps
from fastvlp.training.state import save_config, save_weights

# Points kept of each training-loss curve.
CURVE_POINTS = 120


@dataclass(frozen=True, kw_only=True)
class Plan:
    """budget_s: training seconds of each arm and seed. marks: shares of the budget at which arms are scored; the end is
    always one. slice_s: seconds of one turn. out: folder of results.json and report.html."""

    budget_s: float
    out: Path
    seeds: int = 1
    marks: tuple[float, ...] = (0.25, 0.5, 1.0)
    slice_s: float = 5.0

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.slice_s <= 0 or self.seeds < 1:
            raise UserError("--budget and --slice are seconds above 0, and --seeds is at least 1")
        if not all(0 < mark <= 1 for mark in self.marks):
            raise UserError(f"--marks are shares of the budget, above 0 and up to 1, not {self.marks}")

    @property
    def shares(self) -> list[float]:
        return sorted({*self.marks, 1.0})


class Scorer(Protocol):
    """What the arms are measured with; scores must not change the state. settings: a dataclass, for the report."""

    @property
    def settings(self) -> Any: ...

    def score(self, state: TrainState) -> dict[str, float]: ...

    def samples(self, states: Mapping[str, TrainState]) -> list[Sample]:
        """Pictures with what each arm says of them, right after each arm's last score."""


@dataclass(kw_only=True)
class Lane:
    """One arm with one seed, and its place in the budget."""

    state: TrainState
    reports: Iterator[StepReport]
    run: ArmRun
    shares: Sequence[float]
    budget_s: float
    spent: Spent = field(default_factory=Spent)
    ended: bool = False
    recent: list[dict[str, float]] = field(default_factory=list)

    @property
    def next_mark(self) -> float:
        """Training seconds at which the arm is scored next."""
        return self.shares[len(self.run.marks)] * self.budget_s

    @property
    def due(self) -> bool:
        return not self.done and (self.ended or self.spent.time >= self.next_mark)

    @property
    def done(self) -> bool:
        return len(self.run.marks) == len(self.shares) or self.run.failure is not None

    def train(self, slice_s: float) -> None:
        """Pulls steps for a turn, at least one, at most to the next mark. Only the time inside the steps counts."""
        until = min(self.spent.time + slice_s, self.next_mark)
        while not self.ended and self.spent.time < until:
            self._step(until)

    def _step(self, until: float) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        report = next(self.reports, None)
        before = self.spent
        last = report is None or before.time + time.perf_counter() - wall >= until
        if last and self.state.device.type == "cuda":
            # Work that is still queued belongs to this arm, not to whoever is next.
            torch.cuda.synchronize(self.state.device)
        self.spent = Spent(
            time=before.time + time.perf_counter() - wall,
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
        """A point of the loss curve is the mean over the steps since the one before."""
        if not report.skipped:
            self.recent.append(report.losses)
        if self.recent and len(self.run.curve) <= self.spent.time / self.budget_s * CURVE_POINTS:
            terms = [name for name in report.losses if name != "loss"]
            losses = {name: fmean(step[name] for step in self.recent) for name in terms}
            self.run.curve.append(LossPoint(spent=self.spent, losses=losses))
            self.recent.clear()

    def mark(self, scores: dict[str, float], scoring_s: float) -> None:
        share = self.shares[len(self.run.marks)]
        self.run.marks.append(Mark(share=share, spent=self.spent, scores=scores, scoring_s=scoring_s))
        self.run.dropped = len(self.state.dropped)


def resolved(plan: Plan, arms: Mapping[str, TrainConfig]) -> dict[str, TrainConfig]:
    """Each arm with the budget as its length, so that its schedule runs on its own clock."""
    return {
        arm: replace(run, name=arm, steps=None, budget_s=plan.budget_s, out=str(plan.out / "runs" / arm))
        for arm, run in arms.items()
    }


def with_tokenizers(runs: Mapping[str, TrainConfig], out: Path) -> dict[str, TrainConfig]:
    """Runs that would train a tokenizer of their own on the same texts share one, trained once, in `out`."""
    trained: list[tuple[Any, int, str]] = []
    made = dict(runs)
    for arm, run in runs.items():
        if run.tokenizer is not None or run.init is not None:
            continue
        path = next((path for data, vocab, path in trained if (data, vocab) == (run.data, run.vocab)), None)
        if path is None:
            path = str(out / f"tokenizer-{arm}.json")
            Tokenizer.train(run.data.texts(), "wordpiece", vocab_size=run.vocab).save(path)
            trained.append((run.data, run.vocab, path))
        made[arm] = replace(run, tokenizer=path)
    return made


def reference(arms: Mapping[str, TrainConfig]) -> str:
    """The arm that the others are timed against: the first that trains MLM alone, else the first."""
    alone = [
        arm
        for arm, run in arms.items()
        if len(run.objectives) == 1 and isinstance(next(iter(run.objectives.values())), MLMConfig)
    ]
    return (alone or list(arms))[0]


def keep_weights(state: TrainState) -> None:
    save_config(state)
    save_weights(state, "last")


def compare(
    plan: Plan,
    arms: Mapping[str, TrainConfig],
    *,
    origin: dict[str, Any],
    scorer: Scorer,
    display: Display,
    begin: Callable[[TrainConfig], TrainState] = start,
    go_on: Callable[[TrainState], Iterator[StepReport]] = steps,
    keep: Callable[[TrainState], None] = keep_weights,
) -> Comparison:
    """Trains and scores every arm with every seed; results.json and report.html are whole after every mark, and each
    arm's last weights lie in runs/ARM-SEED, as a run's do."""
    runs = with_tokenizers(resolved(plan, arms), plan.out)
    comparison = Comparison(
        arms=list(runs),
        reference=reference(runs),
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        shares=plan.shares,
        about=origin,
        settings={k: v for k, v in asdict(plan).items() if k != "out"} | asdict(scorer.settings),
        configs={arm: cast(dict[str, Any], to_json(run)) for arm, run in runs.items()},
    )
    save(comparison, plan.out)
    for seed in range(plan.seeds):
        lanes = []
        for arm, run in runs.items():
            display.note(f"seed {seed}: building {arm}")
            state = begin(replace(run, seed=run.seed + seed, out=f"{run.out}-{run.seed + seed}"))
            record = ArmRun(arm=arm, seed=state.run.seed)
            comparison.runs.append(record)
            lanes.append(
                Lane(state=state, reports=go_on(state), run=record, shares=plan.shares, budget_s=plan.budget_s)
            )
        race(lanes, plan.slice_s, scorer, display, lambda: save(comparison, plan.out))
        sound = {lane.run.arm: lane.state for lane in lanes if not lane.run.failure}
        for state in sound.values():
            keep(state)
        if seed == 0:
            display.note("captions and answers for the report")
            comparison.samples = scorer.samples(sound)
            save(comparison, plan.out)
    return comparison


def save(comparison: Comparison, out: Path) -> None:
    comparison.save(out / "results.json")
    write_report(comparison, out / "report.html")


def race(lanes: Sequence[Lane], slice_s: float, scorer: Scorer, display: Display, saved: Callable[[], None]) -> None:
    """Turn after turn until every lane is done; the order rotates, so that no arm always follows the same one."""
    turn = 0
    while any(not lane.done for lane in lanes):
        first = turn % len(lanes)
        for lane in [*lanes[first:], *lanes[:first]]:
            if not lane.done:
                _turn(lane, slice_s, scorer, display, saved)
        turn += 1


def _turn(lane: Lane, slice_s: float, scorer: Scorer, display: Display, saved: Callable[[], None]) -> None:
    try:
        lane.train(slice_s)
        display.trained(lane.run, lane.spent)
        while lane.due:
            began = time.perf_counter()
            lane.mark(scorer.score(lane.state), time.perf_counter() - began)
            display.scored(lane.run, lane.run.marks[-1])
            saved()
    except UserError as error:
        # One arm that diverges, in training or in the fine-tuning that scores it, is a result; the others go on.
        lane.run.failure = str(error)
        display.note(f"{lane.run.arm}: {error}")
        saved()


def run_comparison(told: Compare) -> Comparison:
    """`vlp compare`. Prints the tables."""
    if not told.recipes:
        raise UserError(f"name at least one recipe; there are {', '.join(names())}")
    if dist.launched() > 1:
        raise UserError("vlp compare gives each arm one device; start it without torchrun")
    if told.threads:
        torch.set_num_threads(told.threads)
    same_arms(Path(name).stem for name in told.recipes)
    changes = list(chain.from_iterable(told.set))
    arms = {Path(name).stem: override(recipe(name), changes, Path(name).stem) for name in told.recipes}
    plan = Plan(
        budget_s=duration(told.budget),
        out=told.out,
        seeds=told.seeds,
        marks=told.marks,
        slice_s=duration(told.slice),
    )
    if (plan.out / "results.json").exists():
        raise UserError(f"{plan.out}: holds a comparison already; choose another --out, or delete it")
    device = pick_device(next(iter(arms.values())).device)
    with Display(list(arms), budget_s=plan.budget_s, seeds=plan.seeds, marks=len(plan.shares)) as display:
        made = compare(plan, arms, origin=about(device), scorer=Yardsticks(settings=told.yardsticks), display=display)
    print_tables(made, Console())
    if all(run.failure for run in made.runs):
        raise UserError(f"no arm came through: {made.runs[0].failure}")
    return made


def same_arms(names: Iterable[str]) -> None:
    """Raises UserError where two arms would share a name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"two arms are called {name}; give the second recipe file another name")
        seen.add(name)
