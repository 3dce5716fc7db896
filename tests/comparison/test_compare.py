"""Arms by turns, on a clock that the test moves: fair turns, scores in time, results complete after each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastvlp.comparison import arm_training
from fastvlp.comparison.compare import compare
from fastvlp.comparison.plan import Plan
from fastvlp.comparison.prepared_arms import check_distinct, named_arms, reference_arm, with_budget, with_tokenizers
from fastvlp.comparison.results import Comparison, Sample, Scored
from fastvlp.comparison.summary import busy_note
from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.recipes import recipe
from tests.made_arms import ARMS, Run, World, go, thirds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_turns_alternate_and_rotate(world: World, tmp_path: Path) -> None:
    go(world, Plan(budget_s=8, out=tmp_path, slice_s=4, marks=(1.0,)), ARMS)
    assert world.order == ["flm"] * 2 + ["mlm"] * 4 + ["mlm"] * 4 + ["flm"] * 2


def test_only_time_inside_the_steps_counts(world: World, tmp_path: Path) -> None:
    comparison, _ = go(world, Plan(budget_s=16, out=tmp_path, slice_s=3, marks=(0.25, 0.5)), ARMS)
    for arm, steps in (("flm", [2, 4, 8]), ("mlm", [4, 8, 16])):
        (run,) = comparison.runs_of(arm)
        assert [m.share for m in run.marks] == [0.25, 0.5, 1.0]
        assert [m.spent.time for m in run.marks] == [4, 8, 16]
        assert [m.spent.cpu for m in run.marks] == [m.spent.time for m in run.marks]
        assert [m.spent.steps for m in run.marks] == steps
        assert [m.scoring_s for m in run.marks] == [1, 1, 1000]
        assert run.marks[-1].spent.wait == 0.25 * steps[-1]
        assert run.curve[-1].losses == {"a/next": pytest.approx(1 / steps[-1], rel=0.5)}


def test_budgets_and_turns_may_be_counted_in_steps(world: World, tmp_path: Path) -> None:
    plan = Plan(budget_s=8, out=tmp_path, steps=True, slice_s=2, marks=(0.25, 0.5))
    comparison, text = go(world, plan, ARMS)
    for run in comparison.runs:
        assert [mark.spent.steps for mark in run.marks] == [2, 4, 8]
    assert [run.marks[-1].spent.time for run in comparison.runs] == [16, 8]
    assert comparison.configs["flm"]["steps"] == 8 and comparison.configs["flm"]["budget_s"] is None
    assert "8 steps of training" in text and "once for 8 steps" in (tmp_path / "report.html").read_text()


def test_a_long_step_is_scored_late_and_once_for_each_share(world: World, tmp_path: Path) -> None:
    comparison, _ = go(world, thirds(tmp_path), {"slow": Run(objectives={"ar": ARConfig()}, step_s=5.0)})
    (run,) = comparison.runs
    assert [m.spent.time for m in run.marks] == [5, 5, 10]


def test_seeds_come_one_after_another(world: World, tmp_path: Path) -> None:
    comparison, text = go(world, Plan(budget_s=4, out=tmp_path, seeds=3, marks=(0.5,)), ARMS)
    assert [seed for _, seed, _ in world.scored] == sorted(seed for _, seed, _ in world.scored)
    assert len(comparison.runs) == 6 and all(len(run.marks) == 2 for run in comparison.runs)
    assert "mlm" in text and "not reached" in text


def test_an_arm_that_fails_leaves_the_others_alone(world: World, tmp_path: Path) -> None:
    arms = {"mlm": ARMS["mlm"], "ar": Run(objectives={"ar": ARConfig()}, breaks_at=3)}
    comparison, text = go(world, thirds(tmp_path), arms)
    assert comparison.runs_of("ar")[0].failure == "the loss is not finite"
    assert [m.share for m in comparison.runs_of("ar")[0].marks] == [0.25]
    assert len(comparison.runs_of("mlm")[0].marks) == 3
    assert "not finite" in text
    assert "not finite" in (tmp_path / "report.html").read_text()


def test_results_are_complete_after_every_scoring(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(state: Any, *, tuned: bool) -> Scored:
        if len(world.scored) == 3:
            raise KeyboardInterrupt
        return World.score(world, state, tuned=tuned)

    monkeypatch.setattr(world, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        go(world, Plan(budget_s=8, out=tmp_path), ARMS)
    comparison = Comparison.load(tmp_path / "results.json")
    assert sum(len(run.marks) for run in comparison.runs) == 3
    assert not comparison.finished and not list(tmp_path.glob("*.tmp"))
    assert "not finished" in (tmp_path / "report.html").read_text()
    assert "<table>" in (tmp_path / "report.html").read_text()


def test_the_budget_is_the_runs_length(world: World, tmp_path: Path) -> None:
    comparison, _ = go(world, Plan(budget_s=4, out=tmp_path), ARMS)
    assert comparison.configs["flm"]["budget_s"] == 4 and comparison.configs["flm"]["steps"] is None
    assert world.order.count("mlm") == 4


def test_arms_with_the_same_texts_share_a_tokenizer(tmp_path: Path) -> None:
    trained: list[str] = []

    @dataclass(frozen=True)
    class Texts:
        name: str

        def texts(self) -> Iterator[str]:
            trained.append(self.name)
            return iter(["a red circle"] * 3)

    run = Run(objectives={"ar": ARConfig()}, tokenizer=None, data=Texts("one"))
    public = replace(run, text="bert-base-chinese")
    arms = {"a": run, "b": replace(run), "c": replace(run, data=Texts("two")), "d": ARMS["mlm"], "e": public}
    shared = with_tokenizers(arms, tmp_path)  # type: ignore[arg-type]
    assert trained == ["one", "two"]
    assert shared["a"].tokenizer == shared["b"].tokenizer != shared["c"].tokenizer
    assert shared["d"].tokenizer == "given" and shared["e"].tokenizer is None


def test_the_reference_is_mlm_alone_else_the_first() -> None:
    both = Run(objectives={"mlm": MLMConfig(), "ar": ARConfig()})
    ar = Run(objectives={"ar": ARConfig()})
    assert reference_arm({"both": both, "ar": ar, "plain": ARMS["mlm"]}) == "plain"  # type: ignore[dict-item]
    assert reference_arm({"both": both, "ar": ar}) == "both"  # type: ignore[dict-item]


def test_plans_that_cannot_be() -> None:
    plan = Plan(budget_s=10, out=Path(), marks=(0.5,))
    assert plan.shares == [0.5, 1.0]
    for wrong in (
        {"budget_s": 0},
        {"budget_s": 1.5, "steps": True},
        {"seeds": 0},
        {"slice_s": -1},
        {"marks": (0.0,)},
        {"marks": (1.5,)},
    ):
        with pytest.raises(UserError):
            replace(plan, **wrong)
    with pytest.raises(UserError, match=r"\ba\b"):
        check_distinct(["a", "b", "a"])


def test_arms_are_recipes_by_name_by_file_or_as_configs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from fastvlp.recipes.flm_demo import flm_demo\nmine = flm_demo\n")
    config = replace(recipe("ar_demo"), name="short", steps=9, budget_s=None)
    arms = named_arms(["mlm_demo", tmp_path / "mine.py", config], ["vocab=99", "short:optim.lr=0.5"])
    assert list(arms) == ["mlm_demo", "mine", "short"]
    assert [run.vocab for run in arms.values()] == [99] * 3
    assert arms["short"].optim.lr == 0.5 != arms["mine"].optim.lr
    with pytest.raises(UserError, match="long:vocab=9"):
        named_arms([config], ["long:vocab=9"])


def test_an_earlier_comparison_is_not_written_over(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}: .*`out`"):
        compare(["flm_demo"], out=tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"


def test_a_comparison_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        compare(["flm_demo"])


def test_weights_are_kept_apart_by_seed_before_they_are_scored(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, kept_before = world.score, []

    def noted(state: Any, *, tuned: bool) -> Scored:
        kept_before.append(world.kept[-1] == state.run.out)
        return score(state, tuned=tuned)

    monkeypatch.setattr(world, "score", noted)
    go(world, replace(thirds(tmp_path), seeds=2), ARMS | {"broken": replace(ARMS["mlm"], breaks_at=1)})
    assert len(kept_before) == 12 and all(kept_before)
    assert {*world.kept} == {str(tmp_path / "runs" / f"{arm}-{seed}") for seed in (0, 1) for arm in ARMS}


def test_what_is_scored_is_read_before_the_first_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(state: Any) -> None:
        raise UserError("r003: damaged")

    monkeypatch.setattr(world, "check", unreadable)
    with pytest.raises(UserError, match="r003"):
        go(world, Plan(budget_s=8, out=tmp_path), ARMS)
    assert world.order == []


def test_a_report_without_pictures_does_not_end_a_comparison(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(states: Any) -> list[Sample]:
        raise UserError("no pictures")

    monkeypatch.setattr(world, "samples", fails)
    comparison, _ = go(world, replace(thirds(tmp_path), seeds=2), ARMS)
    assert len(comparison.runs) == 4 and all(len(run.marks) == 3 for run in comparison.runs)
    assert (tmp_path / "report.html").exists()


def test_a_frozen_encoder_encodes_within_the_budget_unless_its_states_are_stored_by_choice(tmp_path: Path) -> None:
    stored = StatesConfig(store="always")
    arms = {"auto": Run(objectives={}), "stored": Run(objectives={}, states=stored)}
    configs = with_budget(arms, Plan(budget_s=5, out=tmp_path))  # type: ignore[arg-type]
    assert configs["auto"].states.store == "never" and configs["stored"].states == stored


def test_scores_with_fine_tuning_are_measured_at_their_marks(world: World, tmp_path: Path) -> None:
    plan = Plan(budget_s=16, out=tmp_path / "a", marks=(0.25,), tuned_marks=(0.75,))
    go(world, plan, {"mlm": ARMS["mlm"]})
    assert world.tuned == [False, True, True]


def test_marks_are_eighths_and_the_results_say_when_they_are_whole(world: World, tmp_path: Path) -> None:
    comparison, _ = go(world, Plan(budget_s=16, out=tmp_path), ARMS)
    assert comparison.shares == [i / 8 for i in range(1, 9)] and comparison.finished
    assert comparison.blind == {"vqa": 0.3}
    assert comparison.chance == {"vqa": 0.1} and comparison.runs[0].marks[0].errors == {"vqa": 0.01}
    assert Comparison.load(tmp_path / "results.json").finished


def test_a_busy_machine_gives_an_arm_as_much_work(world: World, tmp_path: Path, monkeypatch) -> None:
    """Half of the wall time goes to other programs: twice as much of it is spent, and as many steps are taken."""
    clock = arm_training.time
    monkeypatch.setattr(arm_training, "time", SimpleNamespace(**{**vars(clock), "perf_counter": lambda: 2 * world.now}))
    comparison, text = go(world, Plan(budget_s=16, out=tmp_path, marks=(1.0,)), {"mlm": ARMS["mlm"]})
    (mark,) = comparison.runs[0].marks[-1:]
    assert (mark.spent.steps, mark.spent.time, mark.spent.wall) == (16, 16, 32)
    note = busy_note(comparison)
    assert note is not None and "mlm 0.57" in note  # 16 s of work in 32 s, of which 4 were spent waiting
    assert "The machine was busy" in text and busy_note(replace(comparison, clock="wall")) is None
