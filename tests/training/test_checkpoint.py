"""Checkpoints: whole or not at all, and never a program."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastvlp.errors import UserError
from fastvlp.training.checkpoint import load_checkpoint, save_checkpoint


def test_round_trip_keeps_every_kind_of_state(tmp_path):
    state = {"step": 3, "name": "a", "weights": {"w": torch.arange(6.0).view(2, 3)}, "bad": [1, 2.5, None]}
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    back = load_checkpoint(tmp_path / "run" / "last.pt")
    assert torch.equal(back["weights"].pop("w"), state["weights"].pop("w"))
    assert back == state
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["last.pt"]


FULL_DISK = """
import resource, sys, torch
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_checkpoint(sys.argv[1], {"w": torch.zeros(int(sys.argv[2]))})
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [1 << 20, 16250])  # the second fails at the end, in the zip's directory
def test_full_disk_names_the_path_and_keeps_the_older_file(tmp_path, numbers):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path, str(numbers)], capture_output=True, text=True)
    assert str(path) in done.stdout and "`ulimit -f`" in done.stdout, done.stderr
    assert load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_caller_passes_and_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "last.pt", {"f": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match="no checkpoint here"):
        load_checkpoint(path)
    save_checkpoint(path, {"w": torch.zeros(1000)})
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[: len(whole) // 2], b"\0" * 300 + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.pt: not a readable checkpoint \([^.]{1,100}\); restore"):
            load_checkpoint(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(UserError, match="holds a Tensor"):
        load_checkpoint(path)


def test_a_pickled_program_is_refused(tmp_path):
    torch.save({"f": print}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"not a readable checkpoint \(Weights only load failed\)"):
        load_checkpoint(tmp_path / "last.pt")
