"""One objective a step, drawn by its share: the same for a seed and a step, in training alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fastvlp.errors import UserError
from fastvlp.recipes import recipe
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train, validate
from fastvlp.training.pretraining import draw_objective
from fastvlp.training.train_config import check
from tests.training.runs import assert_equal, made_pairs, made_run, weights

MIX = {"flm": 6.0, "mlm": 8.0, "prefixlm": 4.0}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def test_shares():
    drawn = Counter(draw_objective(MIX, 5, step) for step in range(6000))
    assert {name: count / 6000 for name, count in drawn.items()} == {
        name: pytest.approx(share / 18, abs=0.02) for name, share in MIX.items()
    }
    assert [draw_objective(MIX, 5, s) for s in range(50)] != [draw_objective(MIX, 6, s) for s in range(50)]
    assert draw_objective(None, 5, 0) is None


def test_a_step_runs_the_drawn_objective_and_validation_all(pairs, tmp_path):
    run = made_run(pairs, tmp_path, mix=MIX, steps=12, accumulate=2, batch_size=4)
    state = start(run)
    assert validate(state).keys() > {"flm/forward", "mlm/masked", "prefixlm/next"}
    drawn = []
    for step, report in enumerate(steps(state)):
        (name,) = {term.split("/")[0] for term in report.losses if term != "loss"}
        assert name == draw_objective(MIX, run.seed, step)
        assert report.flops > 0 and report.tokens > 0 and state.pretraining.active == name
        drawn.append(name)
    assert set(drawn) == set(MIX)
    assert validate(state).keys() > {"flm/forward", "mlm/masked", "prefixlm/next"}


def test_a_step_of_a_mix_is_a_step_of_its_objective_alone(pairs, tmp_path):
    mixed = start(made_run(pairs, tmp_path, "mlm", "prefixlm", mix={"mlm": 1.0, "prefixlm": 1.0}, steps=1))
    alone = start(made_run(pairs, tmp_path, str(draw_objective(mixed.run.mix, 0, 0)), steps=1))
    next(steps(mixed))
    next(steps(alone))
    assert_equal(weights(mixed), weights(alone))


def test_a_resumed_mix_equals_a_straight_one(pairs, tmp_path):
    straight = train(made_run(pairs, tmp_path / "straight", mix=MIX, steps=6))
    half = made_run(pairs, tmp_path / "half", mix=MIX, steps=6)
    state = start(replace(half, checkpoint_every=3))
    for report in steps(state):
        if report.step == 3:
            save(state)
            break
    assert_equal(weights(straight), weights(train(half, resume=True)))


@pytest.mark.parametrize("mix", [{"mlm": 1.0}, {**MIX, "itm": 1.0}, {**MIX, "mlm": 0.0}, {}])
def test_a_mix_names_each_objective(pairs, tmp_path, mix):
    with pytest.raises(UserError, match=r"`mix` (must be above 0|.*flm, mlm, prefixlm)"):
        check(made_run(pairs, tmp_path, mix=mix))


def test_the_demo_draws_its_tasks_as_the_paper_does():
    run = recipe("uniter_demo")
    assert run.mix is not None and run.mix.keys() == run.objectives.keys()
    share = {name: part / sum(run.mix.values()) for name, part in run.mix.items()}
    assert share == {name: pytest.approx(x, abs=1e-3) for name, x in zip(run.mix, (0.273, 0.364, 0.182, 0.182))}
