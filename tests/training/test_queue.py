"""A queue and a momentum copy in the loop: resumed, skipped, validated, saved, inherited."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastvlp.model.saving import load_model
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps, train, validate
from tests.training.runs import assert_equal, made_pairs, made_run, weights

QUEUE = ("image_queue", "text_queue", "written")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def queue_of(state) -> dict[str, torch.Tensor]:
    (objective,) = state.pretraining.objectives.values()
    return {name: value.clone() for name, value in objective.state_dict().items() if name in QUEUE}


@pytest.mark.parametrize("name", ["moco", "albef"])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(pairs, tmp_path, name):
    # Epochs of 24 end within steps, and the queue of 20 within the rows of one.
    options = {"batch_size": 7, "accumulate": 2, "ema": 0.9, "dropout": 0.1, "freeze": ("text.word",)}
    run = made_run(pairs, tmp_path / "a", name, **options)
    straight = train(run := replace(run, objectives={name: replace(run.objectives[name], queue=20)}))
    state = start(run := replace(run, out=str(tmp_path / "b")))
    for report in steps(state):
        if report.step == 3:
            break
    save(state)
    state.tokenizer.save(run.folder / "tokenizer.json")
    resumed = train(run, resume=True)
    assert_equal(weights(resumed), weights(straight))
    assert_equal(resumed.ema.state_dict(), straight.ema.state_dict())
    assert queue_of(resumed)["written"] == 6 * 14
    slow, model = resumed.pretraining.objectives[name].slow, resumed.model
    assert slow.text.word.weight is model.text.word.weight, "what is frozen is still shared"


def test_a_skipped_step_writes_nothing_and_moves_nothing(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "moco"))
    reports = steps(state)
    next(reports)
    before, bias = weights(state), state.model.embed.image.out.weight
    kept = bias.detach().clone()
    bias.data[0, 0] = math.nan
    assert next(reports).skipped
    bias.data.copy_(kept)
    assert_equal(weights(state), before)
    assert not next(reports).skipped and queue_of(state)["written"] == 16


def test_validation_leaves_queue_and_copy_alone(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "moco", steps=2))
    reports = steps(state)
    next(reports)
    before = weights(state)
    assert validate(state) == validate(state)
    assert_equal(weights(state), before)
    assert not next(reports).skipped


def test_weights_are_saved_without_copy_and_queues(pairs, tmp_path):
    state = train(made_run(pairs, tmp_path, "albef", steps=1))
    saved = load_model(tmp_path, "last")
    assert set(saved.objectives) == {"albef.temperature"}
    assert_equal(saved.model.state_dict(), state.model.state_dict())


def test_the_copy_begins_as_what_was_inherited(pairs, tmp_path):
    train(made_run(pairs, tmp_path / "a", "clip", steps=2))
    state = start(made_run(pairs, tmp_path / "b", "moco", init=str(tmp_path / "a")))
    slow = state.pretraining.objectives["moco"].slow
    wanted = load_model(tmp_path / "a").model
    assert all(torch.equal(p, wanted.get_parameter(name)) for name, p in slow.named_parameters())


def test_the_optimiser_has_no_part_of_the_copy(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "moco", steps=1))
    trained = {id(p) for group in state.optimiser.param_groups for p in group["params"]}
    objective = state.pretraining.objectives["moco"]
    assert not trained & {id(p) for p in objective.parameters()}
    next(steps(state))
    assert all(p.grad is None for p in objective.parameters())


def test_one_pair_a_step_is_enough(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path, "moco", batch_size=1, steps=2))
    assert all(not report.skipped and report.losses["loss"] > 0 for report in steps(state))


@pytest.mark.parametrize("queue", [5, 8, 13])
def test_a_queue_of_any_length(pairs, tmp_path, queue):
    run = made_run(pairs, tmp_path, "moco", steps=3)
    state = start(replace(run, objectives={"moco": MoCoConfig(queue=queue)}))
    assert not any(report.skipped for report in steps(state))
    assert queue_of(state)["written"] == 24
