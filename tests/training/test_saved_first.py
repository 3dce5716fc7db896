"""Whatever fails, what was trained is on disk first; data that is read later is read once before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastvlp.data.pairs import PairMaker
from fastvlp.data.records.shards import ShardWriter
from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.training import loop, validation
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, weights


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"))


def unreadable(folder, name: str):
    """A split whose last record is cut, beyond the first batch."""
    with ShardWriter(folder / name) as writer:
        for record in made_records(12):
            writer.write(replace(record, images=(record.images[0][:60],)) if record.key == "r011" else record)
    return str(folder / name)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_validation_record_is_found_before_the_first_step(pairs, tmp_path, monkeypatch, workers):
    run = made_run(pairs, tmp_path / "a", "mlm", workers=workers)
    run = replace(run, data=replace(run.data, val=unreadable(tmp_path, "bad")))
    monkeypatch.setattr(loop, "steps", lambda state: pytest.fail("a step was trained"))
    with pytest.raises(UserError, match="r011"):
        train(run)


def test_splits_that_are_scored_later_are_read_before_the_first_step(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm")
    run = replace(run, data=replace(run.data, test=unreadable(tmp_path, "bad")))
    monkeypatch.setattr(loop, "steps", lambda state: pytest.fail("a step was trained"))
    with pytest.raises(UserError, match="r011"):
        train(run, scored=("val", "test"))


def broken(*_):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), UserError("a record is away")])
@pytest.mark.parametrize("step", [2, 6])
def test_a_validation_that_fails_leaves_a_state_to_go_on_from(pairs, tmp_path, monkeypatch, error, step):
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=2)
    straight = train(replace(run, out=str(tmp_path / "b")))

    def fails(state):
        if state.step == step:
            raise error
        return validate(state)

    validate = validation.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "validate", fails)
        with pytest.raises(type(error)) as raised:
            train(run)
    said = str(raised.value) + "".join(getattr(raised.value, "__notes__", ()))
    assert str(error) in said and f"step {step} is saved" in said
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == step
    resumed = train(run, resume=True)
    assert_equal(weights(resumed), weights(straight))
    assert resumed.best == straight.best
    assert validations(tmp_path / "a") == validations(tmp_path / "b")
    assert load_model(tmp_path / "a", "best").info["step"] == load_model(tmp_path / "b", "best").info["step"]


def validations(folder):
    import json

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]


def test_a_killed_validation_is_repeated(pairs, tmp_path, monkeypatch):
    # SIGKILL leaves no exception: what is on disk when the validation begins is all there is.
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=2, checkpoint_every=None)

    def killed(state):
        if state.step == 4:
            raise KeyboardInterrupt
        return validate(state)

    validate = validation.validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "validate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == 4
    train(run, resume=True)
    train(replace(run, out=str(tmp_path / "b")))
    assert validations(tmp_path / "a") == validations(tmp_path / "b")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_fail_in_training_leave_the_state_of_the_last_step(pairs, tmp_path, workers):
    run = made_run(pairs, tmp_path / "a", "mlm", workers=workers)
    make = PairMaker.__call__

    def fails(self, rows):
        if len(rows) == 8 and rows[0] == fifth:
            raise UserError("the host is away")
        return make(self, rows)

    state = loop.start(run)
    fifth = state.train.rows(4)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairMaker, "__call__", fails)
        with pytest.raises(UserError, match=r"the host is away.*step 4"):
            train(run)
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == 4
    assert_equal(weights(train(run, resume=True)), weights(train(replace(run, out=str(tmp_path / "b")))))


def test_an_error_within_a_step_leaves_the_state_before_it(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", ema=0.9)
    backward, calls = loop.backward, []

    def fails(state, micro):
        calls.append(1)
        if len(calls) == 4:
            backward(state, micro)
            raise torch.OutOfMemoryError("out of memory")
        return backward(state, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "backward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            train(run)
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == 3
    assert_equal(weights(train(run, resume=True)), weights(train(replace(run, out=str(tmp_path / "b")))))


def test_half_a_step_is_not_saved(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", checkpoint_every=2)
    calls = []

    def fails(self):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("half of it")

    monkeypatch.setattr("fastvlp.training.pretraining.Pretraining.after_step", fails)
    with pytest.raises(RuntimeError):
        train(run)
    assert load_checkpoint(tmp_path / "a/last.pt")["step"] == 2


def test_a_diverged_run_keeps_its_last_sound_checkpoint(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "a", "mlm", checkpoint_every=2, max_bad_steps=2)
    backward, calls = loop.backward, []

    def spoils(state, micro):
        calls.append(1)
        if len(calls) == 4:
            state.model.head.vocabulary.bias.data[7] = torch.nan
        return backward(state, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "backward", spoils)
        with pytest.raises(UserError, match="not finite"):
            train(run)
    saved = load_checkpoint(tmp_path / "a/last.pt")
    assert saved["step"] == 2 and all(x.isfinite().all() for x in saved["pretraining"].values())
