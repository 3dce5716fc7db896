"""A comparison that was killed at any moment continues to the same steps, weights and scores as one that was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastvlp.comparison import turns
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.results import Comparison, Sample, Scored
from fastvlp.errors import UserError
from tests.made_arms import ARMS, Killed, Run, World, go


def kill() -> None:
    raise Killed


class Mortal(World):
    """A world in which the process can be killed between any two things that it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__(monkeypatch)
        self.lives = -1
        # Turns of a few seconds, and a checkpoint in every third one.
        self.saving_s = 0.5
        write = Comparison.save

        def save(comparison: Comparison, path: Path) -> None:
            self.moment()
            write(comparison, path)
            self.moment()

        monkeypatch.setattr(Comparison, "save", save)
        # The report does not matter to where a comparison continues.
        monkeypatch.setattr(turns, "write_report", lambda comparison, path: None)

    def moment(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            raise Killed

    def start(self, run: Run, *, resume: bool) -> Any:
        self.moment()
        return super().start(run, resume=resume)

    def steps(self, state: Any) -> Iterator[Any]:
        for report in super().steps(state):
            self.moment()
            yield report

    def score(self, state: Any, *, tuned: bool = True) -> Scored:
        self.moment()
        return super().score(state, tuned=tuned)

    def keep(self, state: Any) -> None:
        self.moment()
        super().keep(state)
        self.moment()

    def forget(self, folder: Any) -> None:
        self.moment()
        super().forget(folder)

    def samples(self, states: Mapping[str, Any]) -> list[Sample]:
        self.moment()
        return super().samples(states)


def content(comparison: Comparison) -> dict[str, Any]:
    runs = sorted(comparison.runs, key=lambda run: (run.arm, run.seed))
    return {
        "runs": runs, "samples": comparison.samples, "chance": comparison.chance, "finished": comparison.finished,
        "sampled": sorted(comparison.sampled),
    }  # fmt: skip


def test_killed_at_any_moment_it_continues_to_the_same_results(tmp_path):
    arms = {**ARMS, "broken": replace(ARMS["mlm"], breaks_at=7)}
    plan = Plan(budget_s=10, out=tmp_path / "whole", seeds=2, marks=(0.5,), slice_s=3)
    with pytest.MonkeyPatch.context() as patch:
        whole, _ = go(Mortal(patch), plan, arms)
    assert whole.finished and whole.sampled == ["flm", "mlm"] and len(whole.runs) == 6
    assert [len(run.marks) for run in whole.runs] == [2, 2, 1] * 2
    moment, killed = 0, True
    while killed:
        moment += 9
        with pytest.MonkeyPatch.context() as patch:
            comparison, world, killed = killed_at(moment, patch, replace(plan, out=tmp_path / str(moment)), arms)
        assert content(comparison) == content(whole), f"killed at moment {moment}"
        assert not world.disk, "the states of arms that are done are not kept"
    assert moment > 80


def killed_at(
    moment: int, patch: pytest.MonkeyPatch, plan: Plan, arms: Mapping[str, Run]
) -> tuple[Comparison, Mortal, bool]:
    """A comparison that is continued after it was killed, and whether it was."""
    world = Mortal(patch)
    world.lives = moment
    try:
        go(world, plan, arms)
        killed = False
    except Killed:
        killed = True
        go(world, plan, arms)
    return Comparison.load(plan.out / "results.json"), world, killed


def test_what_was_trained_before_the_last_checkpoint_is_not_trained_again(monkeypatch, tmp_path):
    world, plan = Mortal(monkeypatch), Plan(budget_s=40, out=tmp_path, marks=(0.5,), slice_s=5)
    saved: list[int] = []
    keep = world.keep
    monkeypatch.setattr(world, "keep", lambda state: (saved.append(state.step), keep(state)))
    monkeypatch.setattr(world, "moment", lambda: kill() if len(world.order) == 33 else None)
    with pytest.raises(Killed):
        go(world, plan, {"mlm": ARMS["mlm"]})
    monkeypatch.setattr(world, "moment", lambda: None)
    before, step = len(world.order), saved[-1]
    assert before > step > 10
    go(world, plan, {"mlm": ARMS["mlm"]})
    assert len(world.order) == before + 40 - step


def test_only_an_arm_that_was_saved_is_said_to_be_continued(monkeypatch, tmp_path):
    world, plan = Mortal(monkeypatch), Plan(budget_s=40, out=tmp_path, marks=(0.5,), slice_s=5)
    monkeypatch.setattr(world, "moment", lambda: kill() if "mlm" in world.order else None)
    with pytest.raises(Killed):
        go(world, plan, ARMS)
    assert len(world.disk) == 1
    monkeypatch.setattr(world, "moment", lambda: None)
    _, text = go(world, plan, ARMS)
    assert "seed 0: continuing flm" in text and "seed 0: building mlm" in text


def test_saving_costs_no_training_time_and_little_of_the_other(monkeypatch, tmp_path):
    world, plan = World(monkeypatch), Plan(budget_s=100, out=tmp_path, marks=(1.0,), slice_s=1)
    world.saving_s = 2.0
    comparison, _ = go(world, plan, {"mlm": ARMS["mlm"]})
    assert comparison.runs[0].marks[-1].spent.time == comparison.runs[0].marks[-1].spent.wall == 100
    # The first turn's end, then once in twenty times as long as saving takes, and before the scores.
    assert len(world.kept) == 1 + 100 // 40 + 1


def test_an_arm_that_failed_keeps_its_failure(monkeypatch, tmp_path):
    world, plan = Mortal(monkeypatch), Plan(budget_s=8, out=tmp_path, marks=(0.5,), slice_s=4)
    arms = {"ar": replace(ARMS["mlm"], breaks_at=1), "mlm": ARMS["mlm"]}
    world.lives = 25
    with pytest.raises(Killed):
        go(world, plan, arms)
    assert world.order.count("ar") == 1
    comparison, _ = go(world, plan, {**arms, "ar": ARMS["mlm"]})
    assert comparison.runs_of("ar")[0].failure == "the loss is not finite" and world.order.count("ar") == 1
    assert len(comparison.runs_of("mlm")[0].marks) == 2


def test_states_that_do_not_fit_the_scores_are_refused(monkeypatch, tmp_path):
    world, plan = Mortal(monkeypatch), Plan(budget_s=40, out=tmp_path, marks=(0.25, 0.5), slice_s=5)
    older: list[dict[str, Any]] = []
    keep = world.keep
    monkeypatch.setattr(world, "keep", lambda state: (keep(state), older.append(dict(world.disk))))
    monkeypatch.setattr(world, "moment", lambda: kill() if len(world.order) == 33 else None)
    with pytest.raises(Killed):
        go(world, plan, {"mlm": ARMS["mlm"]})
    monkeypatch.setattr(world, "moment", lambda: None)
    assert len(older) > 2 and len(Comparison.load(tmp_path / "results.json").runs[0].marks) == 2
    for disk in (older[0], {}):
        world.disk = dict(disk)
        with pytest.raises(UserError, match=r"results\.json"):
            go(world, plan, {"mlm": ARMS["mlm"]})


# From here on with real arms of a few thousand weights, on a clock that counts its readings.
