"""What a run tells while it runs."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
from rich.console import Console

from fastvlp.errors import UserError
from fastvlp.train.log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def made(folder, **options):
    options = {"steps": 100, "console": Console(file=io.StringIO(), width=60)} | options
    return RunLog(folder, name="demo", device="cpu", **options)


def step(log, number, loss=2.0, **counted):
    told = {"pairs": 32, "tokens": 300, "seconds": 0.5, "data_wait": 0.05, "flops": 1e9} | counted
    log.count(**told)
    log.count(**told)
    log.train(number, number * 1.0, {"loss": loss, "flm/forward": 1.0, "flm/reverse": 3.0}, 1e-3, 0.7)


def test_a_training_line_holds_the_rates_since_the_last(tmp_path):
    with made(tmp_path) as log:
        step(log, 10)
        step(log, 20, seconds=1.0, skipped=True, dropped=3)
    first, second = lines(tmp_path)
    assert first["kind"] == "train" and first["step"] == 10 and first["time"] > 1e9
    assert first["loss"] == 2.0 and first["loss/flm/reverse"] == 3.0
    assert first["pairs_per_s"] == 64 and first["tokens_per_s"] == 600
    assert first["flops_per_s"] == 2e9 and first["data_wait"] == pytest.approx(0.1)
    assert first["left"] == pytest.approx(90 * 0.5)
    assert second["pairs_per_s"] == 32 and second["skipped"] == 2 and second["dropped"] == 6
    assert first["memory"] > 1e7


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    with made(tmp_path, console=Console(file=out, width=60)) as log:
        step(log, 10)
        log.write("validation", 10, loss=1.25)
    told = out.getvalue().splitlines()
    assert len(told) == 2, told
    assert "step 10/100" in told[0] and "64 pairs/s" in told[0] and "2 GFLOP/s" in told[0] and "left 0m45s" in told[0]
    assert "loss 2 (flm/forward 1, flm/reverse 3)" in told[0]
    assert told[1] == "step 10  validation  loss 1.25"
    assert lines(tmp_path)[1]["kind"] == "validation"


def test_a_live_view_on_a_terminal(tmp_path):
    out = io.StringIO()
    with made(tmp_path, console=Console(file=out, width=200, force_terminal=True)) as log:
        step(log, 50)
        log.say("a word between")
    shown = out.getvalue()
    assert "50 %" in shown and "64 pairs/s" in shown and "a word between" in shown


def test_a_budget_counts_seconds(tmp_path):
    with made(tmp_path, steps=None, budget_s=60.0, quiet=True) as log:
        step(log, 15)
    assert lines(tmp_path)[0]["left"] == 45.0


def test_quiet_writes_the_file_alone(tmp_path):
    out = io.StringIO()
    with made(tmp_path, console=Console(file=out, force_terminal=True), quiet=True) as log:
        step(log, 1)
    assert out.getvalue() == "" and len(lines(tmp_path)) == 1


def test_a_loss_that_is_no_number_is_null(tmp_path):
    with made(tmp_path, quiet=True) as log:
        step(log, 1, loss=math.nan)
    assert lines(tmp_path)[0]["loss"] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_resuming_drops_later_lines_and_the_one_cut_by_a_kill(tmp_path):
    with made(tmp_path, quiet=True) as log:
        for number in (10, 20, 30):
            step(log, number)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    with made(tmp_path, quiet=True, step=20) as log:
        step(log, 25)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 25]


def test_tensorboard_by_option(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with made(tmp_path, quiet=True, tensorboard=True) as log:
        step(log, 1)
    assert list((tmp_path / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"fastvlp\[tensorboard\]"):
        made(tmp_path, quiet=True, tensorboard=True)


def test_other_ranks_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvlp.dist.is_main", lambda: False)
    with made(tmp_path / "run") as log:
        step(log, 1)
        log.write("validation", 1, loss=1.0)
    assert not (tmp_path / "run").exists()
