"""What is saved while the training goes on is the state of its step, and is on the disk before it is counted on."""

from __future__ import annotations

import errno
import threading
from copy import deepcopy

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.model.saving import load_model
from fastvlp.training import checkpoint, loop
from fastvlp.training.checkpoint import finish_save, load_checkpoint, save
from fastvlp.training.loop import start, steps
from tests.training.runs import assert_equal, made_pairs, made_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"), 12)


@pytest.fixture
def held(monkeypatch):
    """Nothing is written until it is set."""
    event, written = threading.Event(), torch.save

    def waits(state, file):
        assert event.wait(60)
        written(state, file)

    monkeypatch.setattr(torch, "save", waits)
    yield event
    event.set()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_is_written_later_is_the_state_of_its_step(pairs, tmp_path, held, ema):
    # A queue, a momentum copy, a temperature, moments and averages: all of them change in a step.
    state = start(made_run(pairs, tmp_path / "a", "albef", "clip", batch_size=4, ema=ema))
    running = steps(state)
    next(running)
    state.dropped["r1"], state.notes["turns"] = "unreadable", [1]
    expected = deepcopy([module.state_dict() for module in (state.pretraining, state.optimiser, state.evaluated)])
    save(state, background=True)
    state.dropped["r2"] = "unreadable"
    state.notes["turns"].append(2)
    next(running)
    running.close()
    assert state.saved == 0 and not (tmp_path / "a/last.pt").exists()
    held.set()
    finish_save(state)
    assert state.saved == 1 and state.saving is None
    saved = load_checkpoint(tmp_path / "a/last.pt")
    assert saved["step"] == 1 and saved["dropped"] == {"r1": "unreadable"} and saved["notes"] == {"turns": [1]}
    pretraining, optimiser, evaluated = expected
    assert_equal(saved["pretraining"], pretraining)
    assert saved["optimiser"]["param_groups"] == optimiser["param_groups"]
    for i, moments in optimiser["state"].items():
        assert_equal(saved["optimiser"]["state"][i], moments)
    own = {name.removeprefix("model."): x for name, x in evaluated.items() if name.startswith("model.")}
    last = load_model(tmp_path / "a", "last")
    assert last.info["step"] == 1
    assert_equal(last.model.state_dict(), own)


def test_a_failed_save_ends_the_run_with_its_cause_and_is_tried_again(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", checkpoint_every=2, steps=50, batch_size=4)
    written, straight, calls = torch.save, loop.steps, []

    def full(state, file):
        calls.append(state["step"])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(state, file)

    def until_it_has_failed(state):
        for report in straight(state):
            yield report
            if report.step == 4:
                # The step is saved when the next one is asked for.
                assert state.saving.exception() is not None and load_checkpoint(tmp_path / "a/last.pt")["step"] == 2

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(loop, "steps", until_it_has_failed)
    with pytest.raises(UserError, match=r"last\.pt.*No space left.*step 4 is saved"):
        loop.train(run)
    assert calls == [2, 4, 4] and load_checkpoint(tmp_path / "a/last.pt")["step"] == 4


def test_the_training_waits_for_what_cannot_be_copied(pairs, tmp_path):
    state = start(made_run(pairs, tmp_path / "a", "mlm"))
    state.model.made_of = (x for x in ())
    save(state, background=True)
    assert state.saving.done() and (tmp_path / "a/last.pt").exists()


@pytest.mark.parametrize(("free", "waits"), [(1000, True), (1 << 40, False), (None, False)])
def test_the_training_waits_where_a_copy_has_no_room(pairs, tmp_path, monkeypatch, free, waits):
    state = start(made_run(pairs, tmp_path / "a", "mlm"))
    monkeypatch.setattr(checkpoint, "free_memory", lambda: free)
    assert (checkpoint.copied(state) is state) == waits


def test_a_validation_begins_when_its_state_is_on_the_disk(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=2, checkpoint_every=1, steps=3)
    validate, found = loop.validate_and_keep_best, []

    def looks(state, log):
        found.append((state.step, load_checkpoint(tmp_path / "a/last.pt")["step"]))
        validate(state, log)

    monkeypatch.setattr(loop, "validate_and_keep_best", looks)
    loop.train(run)
    assert found == [(2, 2), (3, 3)]


def test_a_validation_after_a_skipped_step_waits_for_the_save_before(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "a", "mlm", validate_every=2, checkpoint_every=1, steps=3)
    validate, log_dropped, writing = loop.validate_and_keep_best, loop.log_dropped, []

    def skips(state, dropped, log):
        log_dropped(state, dropped, log)
        state.bad_steps = int(state.step == 2)

    def looks(state, log):
        writing.append(state.saving)
        validate(state, log)

    monkeypatch.setattr(loop, "log_dropped", skips)
    monkeypatch.setattr(loop, "validate_and_keep_best", looks)
    loop.train(run)
    assert writing == [None, None] and load_checkpoint(tmp_path / "a/last.pt")["step"] == 3
