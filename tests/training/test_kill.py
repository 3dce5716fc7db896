"""A run that is killed and resumed ends where an undisturbed one does. In processes of their own."""

from __future__ import annotations

import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
from tests.processes import start_command
from tests.training.runs import assert_equal, made_pairs

RECIPE = """
import sys
import time
from pathlib import Path

import torch

from fastvlp.data.pairs import PairMaker
from tests.training.runs import made_run

make, write = PairMaker.__call__, torch.save
HERE = Path(__file__).parent


def slowly(self, rows):
    time.sleep(0.05)
    return make(self, rows)


def write_slowly(state, file):
    write(state, file)
    if state["step"] == 10 and (HERE / "slow").exists():
        (HERE / "writing").touch()
        time.sleep(100)


PairMaker.__call__, torch.save = slowly, write_slowly


def mine():
    return made_run(HERE / "pairs", HERE / "run", dropout=0.1, steps=60, checkpoint_every=5, batch_size=4, threads=1)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    made_pairs(tmp_path / "pairs", 20)
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path


def run(folder: Path, *options: str) -> BaseProcess:
    return start_command(["pretrain", str(folder / "mine.py"), *options], folder / "printed.txt")


def wait_for(folder: Path, name: str, process: BaseProcess) -> None:
    end = time.monotonic() + 60
    while not (folder / name).exists():
        assert process.is_alive(), (folder / "printed.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_then_resume_equals_an_undisturbed_run(folder):
    # While the training goes on, all of the second checkpoint is in a file that does not have its name yet.
    (folder / "slow").touch()
    process = run(folder)
    wait_for(folder, "writing", process)
    process.kill()
    process.join()
    (folder / "slow").unlink()
    assert load_checkpoint(folder / "run/last.pt")["step"] == 5 and (folder / "run/last.pt.tmp").stat().st_size
    for options in (["--resume"], ["--out", str(folder / "straight")]):
        process = run(folder, *options)
        process.join(90)
        assert process.exitcode == 0, (folder / "printed.txt").read_text()
    resumed, undisturbed = (load_model(folder / name, "last") for name in ("run", "straight"))
    assert resumed.info["step"] == undisturbed.info["step"] == 60
    assert_equal(resumed.model.state_dict(), undisturbed.model.state_dict())


@pytest.mark.slow
def test_sigterm_ends_a_process_with_143_and_a_checkpoint(folder):
    process = run(folder)
    wait_for(folder, "run/last.pt", process)
    # A job queue may send it to every process, and `torchrun` passes on its own.
    for _ in range(2):
        process.terminate()
        time.sleep(0.05)
    process.join(30)
    assert process.exitcode == 143 and "--resume" in (folder / "printed.txt").read_text()
