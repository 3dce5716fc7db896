"""One process writes to the folder of a run; what was left unfinished goes; a folder that goes is an error."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlp.errors import UserError
from fastvlp.training import loop
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from fastvlp.training.run_folder import locked
from tests.training.runs import made_pairs, made_run


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return made_pairs(tmp_path_factory.mktemp("pairs"), 12)


HOLD = """
import sys
from pathlib import Path
from fastvlp.writer_lock import WriterLock
lock = WriterLock(Path(sys.argv[1]) / "writer.lock", lambda holder: SystemExit(holder))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_cannot_train_into_a_folder(pairs, tmp_path):
    run = made_run(pairs, tmp_path / "run", "clip", steps=1)
    run.folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(UserError, match=str(holder.pid)):
                train(run, resume=resume)
        assert [path.name for path in run.folder.iterdir()] == ["writer.lock"]
        holder.kill()
    # A killed process does not keep the lock.
    train(run)
    assert (run.folder / "last.pt").exists() and not (run.folder / "writer.lock").exists()


def test_files_that_a_killed_run_left_unfinished_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = [
        "last.pt.tmp",
        "best.safetensors.tmp",
        f"model.json.{ended.pid}.tmp",
        "model.json.99999999999999999999.tmp",
    ]
    for name in (*stale, f"results.json.{os.getpid()}.tmp", "notes.txt"):
        (tmp_path / name).write_text("x")
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {
            "writer.lock", "notes.txt", f"results.json.{os.getpid()}.tmp"
        }  # fmt: skip


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="here"), locked(tmp_path / "a/run"):
        raise ValueError("here")
    assert not (tmp_path / "a/run").exists()


def test_a_folder_that_becomes_read_only_ends_the_run_with_that_cause(pairs, tmp_path, monkeypatch):
    run = made_run(pairs, tmp_path / "run", "clip", steps=20, checkpoint_every=2, log_every=100)
    straight = loop.steps

    def refusing(work):
        def refuse(self, *args, **options):
            if self.is_relative_to(run.folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
            return work(self, *args, **options)

        return refuse

    def steps(state):
        for report in straight(state):
            if report.step == 3:
                # The checkpoint of step 2 is written in the background.
                state.saving.result()
                monkeypatch.setattr(Path, "open", refusing(Path.open))
                monkeypatch.setattr(Path, "unlink", refusing(Path.unlink))
            yield report

    monkeypatch.setattr(loop, "steps", steps)
    with pytest.raises(UserError, match=r"last\.pt.*read-only here.*state of step 2 is saved"):
        train(run)
    monkeypatch.undo()
    assert load_checkpoint(run.folder / "last.pt")["step"] == 2
    # The lock file stays, and locks nothing.
    train(run, resume=True)
    assert not (run.folder / "writer.lock").exists()


def test_a_disk_without_room_for_the_lock_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(UserError, match=r"a: cannot write \(No space left on device\); free space"),
        locked(tmp_path / "a"),
    ):
        pass
    assert not [*(tmp_path / "a").iterdir()]


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_folder_that_is_removed_while_the_run_goes_on_is_an_error(pairs, tmp_path, monkeypatch, how):
    run = made_run(pairs, tmp_path / "run", "clip", steps=3, log_every=100)
    straight = loop.steps

    def steps(state):
        for report in straight(state):
            if report.step == 2:
                shutil.rmtree(run.folder)
                if how == "replaced":
                    run.folder.mkdir()
                    (run.folder / "last.pt").write_text("of another run")
            yield report

    monkeypatch.setattr(loop, "steps", steps)
    with pytest.raises(UserError, match=str(run.folder)):
        train(run)
    left = [path.name for path in run.folder.iterdir()] if run.folder.exists() else []
    assert left == ([] if how == "removed" else ["last.pt"])
