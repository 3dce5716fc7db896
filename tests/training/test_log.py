"""The log of a run."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastvlp.errors import UserError
from fastvlp.training.log import RunLog
from fastvlp.training.loop import train as train_run
from fastvlp.training.trackers import check_installed
from tests.training.runs import made_run


@dataclass
class State:
    """As much of a TrainState as a log reads."""

    folder: Path
    steps: int | None = 100
    budget_s: float | None = None
    report_to: tuple[str, ...] = ()
    step: int = 0
    elapsed: float = 0.0
    skipped: int = 0
    dropped: dict = field(default_factory=dict)
    device = torch.device("cpu")
    lock, name, precision, log_every, validate_every, compile = None, "demo", "bf16", 10, None, False

    @property
    def run(self):
        return self

    @property
    def progress(self):
        return self.step / self.steps if self.steps else self.elapsed / self.budget_s


def train(log, state, until, loss=2.0, **changed):
    while state.step < until:
        fields = {
            "pairs": 32,
            "equal_pairs": None,
            "tokens": 300,
            "seconds": 0.5,
            "data_wait": 0.05,
            "flops": 1e9,
            "skipped": False,
        } | changed
        state.step, state.elapsed = state.step + 1, state.elapsed + fields["seconds"]
        losses = {"loss": loss, "flm/forward": 1.0, "flm/reverse": 3.0}
        log.step(SimpleNamespace(step=state.step, losses=losses, lr=1e-3, grad_norm=0.7, **fields), state)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def plain():
    return Console(file=io.StringIO(), width=60)


def test_a_training_line_holds_the_rates_since_the_last(tmp_path):
    state = State(tmp_path)
    with RunLog(state, console=plain()) as log:
        train(log, state, 10)
        state.skipped, state.dropped = 1, {"a": "cut", "b": "cut"}
        train(log, state, 20, seconds=1.0)
    first, second = lines(tmp_path)
    assert first["kind"] == "train" and first["step"] == 10 and first["time"] > 1e9
    assert first["loss"] == 2.0 and first["loss/flm/reverse"] == 3.0
    assert first["pairs_per_s"] == 64 and first["tokens_per_s"] == 600
    assert first["flops_per_s"] == 2e9 and first["data_wait"] == pytest.approx(0.1)
    assert first["left"] == pytest.approx(90 * 0.5)
    assert second["pairs_per_s"] == 32 and second["skipped"] == 1 and second["dropped"] == 2
    assert first["memory"] > 1e7


def test_the_last_step_has_a_line(tmp_path):
    state = State(tmp_path, steps=3)
    with RunLog(state, quiet=True) as log:
        train(log, state, 3)
    assert [line["step"] for line in lines(tmp_path)] == [3]


def test_the_share_of_equal_pairs_is_of_all_rows_since_the_last_line(tmp_path):
    state, console = State(tmp_path), plain()
    with RunLog(state, console=console) as log:
        for until, equal in ((5, 8), (10, 24), (20, 0), (30, None)):
            train(log, state, until, equal_pairs=equal)
    first, second, third = lines(tmp_path)
    assert first["equal_pairs"] == 0.5 and second["equal_pairs"] == 0 and "equal_pairs" not in third
    printed = console.file.getvalue().splitlines()
    assert "equal pairs 50.0%" in printed[0] and "equal" not in printed[1] + printed[2]


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    state, console = State(tmp_path), plain()
    with RunLog(state, console=console) as log:
        train(log, state, 10)
        log.event("validation", step=10, elapsed=5.0, losses={"loss": 1.25})
    printed = console.file.getvalue().splitlines()
    assert len(printed) == 2, printed
    assert (
        "step 10/100" in printed[0]
        and "64 pairs/s" in printed[0]
        and "2 GFLOP/s" in printed[0]
        and "left 0m45s" in printed[0]
    )
    assert "loss 2 (flm/forward 1, flm/reverse 3)" in printed[0]
    assert printed[1] == "step 10  validation  loss 1.25"
    assert lines(tmp_path)[1]["kind"] == "validation"


def test_a_live_view_on_a_terminal(tmp_path):
    state, console = State(tmp_path), Console(file=io.StringIO(), width=250, force_terminal=True)
    with RunLog(state, console=console) as log:
        train(log, state, 50)
        log.say("a word between")
    shown = console.file.getvalue()
    assert "50 %" in shown and "64 pairs/s" in shown and "a word between" in shown


def test_a_budget_counts_seconds(tmp_path):
    state = State(tmp_path, steps=None, budget_s=60.0)
    with RunLog(state, quiet=True) as log:
        train(log, state, 30)
    assert [line["left"] for line in lines(tmp_path)] == [55.0, 50.0, 45.0]


def test_quiet_writes_the_file_alone(tmp_path):
    state, console = State(tmp_path), Console(file=io.StringIO(), force_terminal=True)
    with RunLog(state, console=console, quiet=True) as log:
        train(log, state, 10)
    assert console.file.getvalue() == "" and len(lines(tmp_path)) == 1


def test_a_skipped_step_is_logged_at_once_and_its_loss_is_null(tmp_path):
    state = State(tmp_path)
    with RunLog(state, quiet=True) as log:
        train(log, state, 3)
        train(log, state, 4, loss=math.nan, skipped=True)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(4, None)]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_resuming_drops_later_lines_and_the_one_cut_by_a_kill(tmp_path):
    state = State(tmp_path)
    with RunLog(state, quiet=True) as log:
        train(log, state, 30)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    state = State(tmp_path, step=20)
    with RunLog(state, quiet=True) as log:
        assert [line["step"] for line in lines(tmp_path)] == [10, 20]
        train(log, state, 30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_tensorboard_by_option(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    state = State(tmp_path, report_to=("tensorboard",))
    with RunLog(state, quiet=True) as log:
        train(log, state, 10)
    assert list((tmp_path / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"-e '.\[tensorboard\]'"):
        RunLog(state, quiet=True)


class FakeTracker:
    """As much of wandb, mlflow and trackio as is used; `runs` has what was logged, by id."""

    def __init__(self):
        self.runs, self.open = {}, None

    def init(self, **options):
        self.open = options.get("id") or options["name"]
        self.runs.setdefault(self.open, [])
        return self

    def log(self, values, step):
        self.runs[self.open].append((step, values["train/loss"]))

    def finish(self):
        self.open = None

    set_experiment = log_params = lambda self, *args: None
    end_run = finish

    def start_run(self, run_id, run_name):
        self.init(id=run_id, name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=self.open))

    def log_metrics(self, values, step, run_id):
        assert run_id == self.open
        self.log(values, step)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_run_of_a_tracker(name, tmp_path, monkeypatch):
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    for first, last in ((0, 10), (10, 20)):
        state = State(tmp_path, step=first, report_to=(name,))
        with RunLog(state, quiet=True) as log:
            train(log, state, last)
        assert tracker.open is None
    assert [*tracker.runs.values()] == [[(10, 2.0), (20, 2.0)]]
    state = State(tmp_path, report_to=(name,))
    (tmp_path / "log.jsonl").unlink()
    with RunLog(state, quiet=True) as log:
        train(log, state, 10)
    # One that begins anew is another run there; MLflow's fake has no ids of its own.
    assert len(tracker.runs) == 2 or name == "mlflow"


@pytest.mark.parametrize("lost", ["log", "finish"])
def test_a_tracker_that_loses_its_connection_does_not_end_the_run(lost, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ConnectionError("no route to host")

    tracker = FakeTracker()
    setattr(tracker, lost, fail)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    console = Console(file=io.StringIO())
    state = State(tmp_path, report_to=("wandb",))
    with RunLog(state, console=console) as log:
        train(log, state, 30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]
    assert console.file.getvalue().count("wandb: shows no more numbers (no route to host)") == 1


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLog(State(tmp_path, report_to=("wandb",)), quiet=True)


def test_a_missing_tracker_is_found_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = replace(made_run(tmp_path, tmp_path / "run", "mlm"), report_to=("wandb",))
    with pytest.raises(UserError, match="pip install wandb"):
        train_run(run)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="pip install nosuchtracker"):
        check_installed(("nosuchtracker",))


def test_other_ranks_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvlp.dist.is_main", lambda: False)
    state = State(tmp_path / "run")
    with RunLog(state) as log:
        train(log, state, 10)
        log.event("validation", step=1, elapsed=1.0, losses={"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_slow_steps_are_logged_before_there_are_many(tmp_path):
    state = State(tmp_path)
    with RunLog(state, console=plain()) as log:
        train(log, state, 4, seconds=4.0)
    assert [line["step"] for line in lines(tmp_path)] == [3]
