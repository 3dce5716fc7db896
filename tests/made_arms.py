"""Arms of a comparison that train on a clock which the test moves, and whose states are saved in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fastvlp.comparison import arm_training, turns
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.prepared_arms import reference_arm, with_budget
from fastvlp.comparison.progress import ProgressDisplay, print_tables
from fastvlp.comparison.results import Comparison, Sample, Scored
from fastvlp.comparison.turns import Training, run_comparison
from fastvlp.config import to_json
from fastvlp.data.pairs import PairData
from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.model.sizes import fusion_model
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig


class Killed(BaseException):
    """The process ends."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """As much of a TrainConfig as a comparison looks at."""

    objectives: Mapping[str, Any]
    step_s: float = 1.0
    breaks_at: int | None = None
    name: str = ""
    seed: int = 0
    steps: int | None = 100
    budget_s: float | None = None
    out: str | None = None
    tokenizer: str | None = "given"
    init: str | None = None
    text: str | None = None
    data: Any = None
    device: str = "cpu"
    states: StatesConfig = field(default_factory=StatesConfig)
    vocab: int = 50

    @property
    def folder(self) -> Path:
        return Path(self.out or "")


@dataclass(frozen=True)
class Options:
    pictures: int = 1


class World:
    """A clock, the arms that run on it, and which arm ran when."""

    options = Options()

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.order: list[str] = []
        self.scored: list[tuple[str, int, float]] = []
        self.kept: list[str] = []
        self.tuned: list[bool] = []
        self.scoring_s = 1000.0
        self.saving_s = 3.0
        clock = SimpleNamespace(
            perf_counter=lambda: self.now,
            process_time=lambda: self.now,
            monotonic=lambda: self.now,
        )
        for module in (turns, arm_training):
            monkeypatch.setattr(module, "time", clock)
        self.disk: dict[str, dict[str, Any]] = {}

    def start(self, run: Run, *, resume: bool) -> Any:
        self.now += 50
        if not resume:
            self.disk.pop(str(run.out), None)
        state = {"step": 0, "pairs": 0, "tokens": 0, "elapsed": 0.0, "dropped": {}, "notes": {}, "contents": {}}
        return SimpleNamespace(
            run=run, device=torch.device("cpu"), **(state | deepcopy(self.disk.get(str(run.out), {})))
        )

    def steps(self, state: Any) -> Iterator[Any]:
        while state.step < state.run.steps if state.run.budget_s is None else state.elapsed < state.run.budget_s:
            if state.step == state.run.breaks_at:
                raise UserError("the loss is not finite")
            self.now += state.run.step_s
            state.elapsed += state.run.step_s
            state.step, state.pairs, state.tokens = state.step + 1, state.pairs + 8, state.tokens + 40
            self.order.append(state.run.name)
            losses = {"loss": 1.0, "a/next": 1.0 / state.step}
            yield SimpleNamespace(losses=losses, data_wait=0.25, skipped=False)

    def check(self, state: Any) -> None:
        pass

    def score(self, state: Any, *, tuned: bool = True) -> Scored:
        self.now += self.scoring_s if tuned else 1
        self.scored.append((state.run.name, state.run.seed, state.elapsed))
        self.tuned.append(tuned)
        return Scored({"vqa": state.step / 100}, {"vqa": 0.01}, {"vqa": 0.1}, {"vqa": 0.3})

    def keep(self, state: Any) -> None:
        self.now += self.saving_s
        self.kept.append(state.run.out)
        saved = {name: value for name, value in vars(state).items() if name not in ("run", "device", "clock")}
        self.disk[state.run.out] = deepcopy(saved)

    def forget(self, folder: Any) -> None:
        self.disk.pop(str(folder), None)

    def samples(self, states: Mapping[str, Any]) -> list[Sample]:
        picture = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
        captions = {arm: f"by <{arm}>" for arm in states}
        return [Sample(key="k", picture=picture, references=["a & b"], captions=captions, questions=[])]


def begun(plan: Plan, configs: Mapping[str, Any]) -> Comparison:
    return Comparison(
        arms=list(configs),
        reference=reference_arm(configs),
        budget_s=plan.budget_s,
        seeds=plan.seeds,
        shares=plan.shares,
        about={},
        settings={},
        configs={arm: to_json(config) for arm, config in configs.items()},  # type: ignore[misc]
        folder=plan.out,
        clock="cpu",
        counted="steps" if plan.steps else "seconds",
    )


def go(world: World, plan: Plan, arms: Mapping[str, Run]) -> tuple[Comparison, str]:
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    names, scorings = list(arms), len(plan.shares)
    training: Any = Training(
        begin=world.start,
        iterate=world.steps,
        check=lambda state: None,
        keep=world.keep,
        forget=world.forget,
        is_kept=lambda folder: str(folder) in world.disk,
    )
    configs = with_budget(arms, plan)  # type: ignore[arg-type]
    path = plan.out / "results.json"
    comparison = Comparison.load(path) if path.exists() else begun(plan, configs)
    with ProgressDisplay(
        names, budget_s=plan.budget_s, seeds=plan.seeds, scorings=scorings, console=console
    ) as display:
        run_comparison(plan, configs, comparison=comparison, scorer=world, display=display, training=training)
    print_tables(comparison, console)
    return comparison, console.export_text()


def thirds(out: Path) -> Plan:
    return Plan(budget_s=8, out=out, marks=(0.25, 0.5))


ARMS = {"flm": Run(objectives={"flm": FLMConfig()}, step_s=2.0), "mlm": Run(objectives={"mlm": MLMConfig()})}


def small_config(corpus: Path, objective: ObjectiveConfig, **more: Any) -> TrainConfig:
    """A run with one objective on a corpus in shards, which takes a second."""
    return TrainConfig(
        data=PairData(train=str(corpus / "train"), val=str(corpus / "val"), batch_size=4),
        model=fusion_model(
            width=32, depths=(1, 1, 1), size=32, patch=16, positions=64, norm="pre", reconstructor=True, dropout=0.1
        ),
        objectives={"only": objective},
        optim=OptimConfig(lr=1e-3),
        steps=8,
        device="cpu",
        **more,
    )
