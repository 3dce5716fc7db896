"""A loader process that dies, and too few file handles: an error that names the likely cause, and nothing hangs."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp.batch import Batch
from fastvlp.cli import main
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import PairMaker
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.worker_processes import reserve_handles
from fastvlp.errors import UserError
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import start, train
from tests.training.runs import assert_equal, made_pairs, made_records, made_run, weights


def batch_of(rows: list[Row]) -> Batch:
    index = torch.tensor([[row.index] for row in rows])
    ones = torch.ones(len(rows), dtype=torch.int64)
    return Batch(image=torch.zeros(len(rows), 3, 2, 2, dtype=torch.uint8), ids=index, length=ones, seed=index[:, 0])


def dies(number: int, at: int):
    def make(rows):
        if any(row.index == at for row in rows):
            if number == 0:
                os._exit(7)
            os.kill(os.getpid(), number)
        return batch_of(rows), []

    return make


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "SIGKILL.*memory"),
        (signal.SIGBUS, "SIGBUS.*/dev/shm"),
        (signal.SIGSEGV, "SIGSEGV.*crashed"),
        (signal.SIGTERM, "SIGTERM"),
        (0, "status 7"),
    ],
)
def test_a_dead_worker_is_named_with_its_likely_cause(number, cause):
    batches = Loader(12, dies(number, 5), batch_size=2, seed=0, workers=1).once()
    with pytest.raises(UserError, match=f"a loader process .*{cause}"):
        list(batches)


@pytest.mark.slow
def test_a_killed_worker_costs_no_step(tmp_path):
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "a", "mlm", workers=1)
    sixth, parent = start(run).train.rows(5)[0], os.getpid()
    make = PairMaker.__call__

    def killed(self, rows):
        if rows[0] == sixth and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairMaker, "__call__", killed)
        with pytest.raises(UserError, match=r"SIGKILL.*step \d is saved") as raised:
            train(run)
    # Batches that the process had made ahead are lost with it, but no step.
    step = load_checkpoint(tmp_path / "a/last.pt")["step"]
    assert 3 <= step <= 5 and f"step {step} is saved" in str(raised.value)
    assert_equal(weights(train(run, resume=True)), weights(train(replace(run, out=str(tmp_path / "b")))))


def raises(error):
    def make(rows):
        raise error

    return make


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.tar"), r"a\.tar: Too many open files; .*ulimit -n"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "a.tar"), r"a\.tar: Permission denied; .*permission"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "a.tar"), r"a\.tar: Input/output error; .*disk"),
        (MemoryError(), r"not enough memory.*`data\.workers`"),
    ],
)
def test_what_the_system_refuses_is_an_error_with_a_remedy(workers, error, advice):
    with pytest.raises(UserError, match=advice):
        list(Loader(4, raises(error), batch_size=2, seed=0, workers=workers).once())


@pytest.fixture
def limit_handles():
    """Sets how many files the process may open, from how many it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir()) + 1
    yield lambda allowed: resource.setrlimit(resource.RLIMIT_NOFILE, (allowed(taken), hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def few_handles(limit_handles):
    # Making an index takes a dozen.
    limit_handles(lambda taken: taken + 20)


def test_shards_leave_file_handles_to_others(tmp_path, limit_handles):
    # Making an index takes a dozen.
    limit_handles(lambda taken: 2 * taken + 40)
    quarter = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
    with ShardWriter(tmp_path, per_shard=1) as writer:
        for record in made_records(quarter + 10):
            writer.write(record)
    shards = Shards(tmp_path)
    keys = {shards.read(i).key for i in range(quarter + 10)}
    assert len(keys) == quarter + 10 and len(shards._files) == quarter


def test_too_few_file_handles_are_named(tmp_path, few_handles):
    with ShardWriter(tmp_path / "pairs") as writer:
        for record in made_records(2):
            writer.write(record)
    shards, held = Shards(tmp_path / "pairs"), []
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(UserError, match=r"00000\.tar.*Too many open files.*ulimit -n"):
            shards.read(0)
    finally:
        for fd in held:
            os.close(fd)


def test_the_command_line_ends_without_a_traceback(tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr("fastvlp.cli.run", refused)
    assert main(["data", "inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'x'}: Permission denied; " in said and "Traceback" not in said


def test_absurdly_many_workers_are_refused(tmp_path):
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "a", "mlm", workers=10**6)
    with pytest.raises(UserError, match=r"data\.workers"):
        start(run)


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("no folder")
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "file" / "run", "mlm")
    with pytest.raises(UserError, match=r"file/run: .*Not a directory"):
        train(run)


def test_worker_processes_get_the_handles_that_they_need_or_are_refused(monkeypatch):
    limits = {"soft": 40, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(soft=new[0]))
    reserve_handles(8)
    assert 8 * 16 < limits["soft"] <= 4096
    limits.update(soft=40, hard=40)
    with pytest.raises(UserError, match=r"`data\.workers` 8.*only 40.*ulimit -n"):
        reserve_handles(8)
