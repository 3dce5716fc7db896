"""A run that is killed and resumed ends where an undisturbed one does. In processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastvlp.model.saving import load_model
from fastvlp.training.checkpoint import load_checkpoint
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
COMMAND = [sys.executable, "-c", "import sys; from fastvlp.cli import main; sys.exit(main())", "pretrain"]


@pytest.fixture
def folder(tmp_path) -> Path:
    made_pairs(tmp_path / "pairs", 20)
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path


def run(folder: Path, *options: str) -> subprocess.Popen:
    command = [*COMMAND, str(folder / "mine.py"), *options]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": paths}
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_then_resume_equals_an_undisturbed_run(folder):
    # While the training goes on, all of the second checkpoint is in a file that does not have its name yet.
    (folder / "slow").touch()
    process = run(folder)
    wait_for(folder / "writing", process)
    process.kill()
    process.communicate()
    (folder / "slow").unlink()
    assert load_checkpoint(folder / "run/last.pt")["step"] == 5 and (folder / "run/last.pt.tmp").stat().st_size
    again, straight = run(folder, "--resume"), run(folder, "--out", str(folder / "straight"))
    for process in (again, straight):
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, said
    resumed, undisturbed = (load_model(folder / name, "last") for name in ("run", "straight"))
    assert resumed.info["step"] == undisturbed.info["step"] == 60
    assert_equal(resumed.model.state_dict(), undisturbed.model.state_dict())


@pytest.mark.slow
def test_sigterm_ends_a_process_with_143_and_a_checkpoint(folder):
    process = run(folder)
    wait_for(folder / "run/last.pt", process)
    # A job queue may send it to every process, and `torchrun` passes on its own.
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "--resume" in said
