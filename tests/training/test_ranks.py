"""Two ranks compute what one does."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvlp import dist
from fastvlp.data.records.shards import ShardWriter
from fastvlp.data.state_store import StatesConfig
from fastvlp.errors import UserError
from fastvlp.model.lora import LoRAConfig
from fastvlp.model.saving import load_model
from fastvlp.objectives.moco import MoCoConfig
from fastvlp.training import checkpoint, loop, part_files
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from fastvlp.training.train_config import TrainConfig
from tests.processes import be_rank, free_port, on_ranks, start_processes
from tests.training.runs import OBJECTIVES, ROUNDING, TOKENS, assert_equal, made_pairs, made_records, made_run, weights

# Whole runs, in processes of their own.
pytestmark = pytest.mark.slow

# Those that couple rows are accumulated through cached gradients, beside others and alone.
# `MIXED` runs one of its objectives a step.
MIXED = ("mlm", "clip")
COMBINATIONS = [*((name,) for name in OBJECTIVES), TOKENS, ("flm", "clip", "siglip"), MIXED]


def train_and_gather(runs: list[TrainConfig], out: str) -> None:
    rank = dist.rank()
    for run in runs:
        state = train(run)
        if run.name == "queue":
            torch.save(state.pretraining.state_dict(), f"{out}/queue{rank}.pt")
    x = torch.full((2, 3), float(rank), requires_grad=True)
    everyone, first = dist.gather(x[: 2 - rank])
    (everyone * torch.arange(9).reshape(3, 3) * (rank + 1)).sum().backward()
    torch.save({"rows": everyone.detach(), "grad": x.grad, "first": first}, f"{out}/gather{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One process group for all runs: starting one takes longer than they do."""
    folder = tmp_path_factory.mktemp("ranks")
    pairs = made_pairs(folder / "pairs")
    runs = []
    for names in COMBINATIONS:
        options = {"steps": 3, "threads": 1, "ema": 0.5}
        options |= {"mix": {"mlm": 2, "clip": 1}} if names == MIXED else {}
        train(made_run(pairs, folder / "one" / "-".join(names), *names, batch_size=12, **options))
        runs.append(made_run(pairs, folder / "two" / "-".join(names), *names, batch_size=3, accumulate=2, **options))
    # Steps of 12 and a queue of 20: which keys are left depends on their order.
    odd = {"objectives": {"moco": MoCoConfig(queue=20, momentum=0.9)}, "steps": 3, "threads": 1, "name": "queue"}
    odd["freeze"] = ("text.word",)
    train(made_run(pairs, folder / "one" / "queue", "moco", batch_size=12, **odd))
    runs.append(made_run(pairs, folder / "two" / "queue", "moco", batch_size=6, **odd))
    copies = made_pairs(folder / "copies", copies=True)
    for name, names in {"equal": ("clip", "siglip"), "equal-queue": ("albef",)}.items():
        train(made_run(copies, folder / "one" / name, *names, batch_size=12, steps=3, threads=1))
        runs.append(made_run(copies, folder / "two" / name, *names, batch_size=3, accumulate=2, steps=3, threads=1))
    frozen = {"freeze": ("image",), "states": StatesConfig(store="always"), "steps": 3, "threads": 1}
    train(made_run(pairs, folder / "one" / "stored", "clip", batch_size=12, **frozen))
    adapted = {"lora": LoRAConfig(rank=2), "steps": 3, "threads": 1, "ema": 0.5}
    train(made_run(pairs, folder / "one" / "lora", "clip", "mlm", batch_size=12, **adapted))
    runs.append(made_run(pairs, folder / "two" / "lora", "clip", "mlm", batch_size=3, accumulate=2, **adapted))
    # Of their own, so that the ranks compute the states: one of them does.
    again = made_pairs(folder / "again")
    runs.append(made_run(again, folder / "two" / "stored", "clip", batch_size=6, **frozen))
    bad = [replace(r, images=(b"",)) if i % 3 == 0 else r for i, r in enumerate(made_records(12))]
    with ShardWriter(folder / "bad" / "train") as writer:
        for record in bad:
            writer.write(record)
    with ShardWriter(folder / "bad" / "val") as writer:
        writer.write(bad[1])
    runs.append(made_run(folder / "bad", folder / "two" / "bad", "mlm", batch_size=6, steps=1, threads=1))
    on_ranks(2, train_and_gather, runs, str(folder))
    return folder


def until_it_is_killed(rank: int, port: int, run: TrainConfig) -> None:
    be_rank(rank, 2, port)
    straight, write, written = loop.steps, part_files.save_file, []

    def steps(state):
        for report in straight(state):
            yield report
            if rank == 1 and report.step == 3 and not run.shard:
                os.kill(os.getpid(), signal.SIGKILL)

    def write_half(tensors, path, metadata):
        write(tensors, path, metadata)
        written.append(path)
        if rank == 1 and len(written) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    loop.steps, part_files.save_file = steps, write_half
    try:
        train(run)
    except UserError as error:
        (run.folder / "said.txt").write_text(str(error))


@pytest.mark.parametrize("shard", [False, True])
def test_a_rank_that_is_killed_is_the_cause_that_the_other_gives(tmp_path, shard):
    options = {"threads": 1, "checkpoint_every": 2, "shard": shard}
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "run", "clip", **options)
    ranks = start_processes(until_it_is_killed, (free_port(), run), 2, join=False).processes
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL]
    saved = load_checkpoint(run.folder / "last.pt")
    said, step = (run.folder / "said.txt").read_text(), saved["step"]
    assert saved["pretraining"] and saved["optimiser"]["state"]
    # A part of the sharded weights is lost, while the second checkpoint is written.
    assert step in ((2,) if shard else (2, 3))
    assert said.startswith("another rank has ended") and f"state of step {step} is saved" in said
    # Also a state that was written while the training went on is exact, and one rank goes on from it.
    resumed = train(replace(run, shard=False), resume=True)
    straight = train(replace(run, shard=False, out=str(tmp_path / "straight"), accumulate=2))
    assert_equal(weights(resumed), weights(straight), 1e-6)


def whose_disk_is_full(rank: int, port: int, run: TrainConfig) -> None:
    be_rank(rank, 2, port)
    straight = checkpoint.save_checkpoint

    def save_checkpoint(path, state):
        if state["step"] == 4:
            raise UserError(f"{path}: cannot write (no space left)")
        straight(path, state)

    checkpoint.save_checkpoint = save_checkpoint
    try:
        train(run)
    except UserError as error:
        Path(f"{run.folder}-{rank}.txt").write_text(str(error))


def test_what_the_main_rank_cannot_save_is_an_error_of_all(tmp_path):
    run = made_run(made_pairs(tmp_path / "pairs"), tmp_path / "run", "clip", threads=1, checkpoint_every=2)
    ranks = start_processes(whose_disk_is_full, (free_port(), run), 2, join=False).processes
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    said = [(tmp_path / f"run-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("no space left" in text for text in said)
    # A step or two may be done before it is known. Step 4 is refused again, later ones are not.
    step = load_checkpoint(run.folder / "last.pt")["step"]
    assert step in (2, 5, 6) and f"state of step {step} is saved" in said[0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), False),
        (RuntimeError("connection refused by a tracker"), False),
        (ValueError("gloo: connection reset by peer"), False),
    ],
)
def test_only_a_lost_connection_between_ranks_is_explained(error, lost):
    assert (dist.explained(error) is not error) == lost


@pytest.mark.parametrize("names", [*COMBINATIONS, ("equal",), ("equal-queue",), ("stored",), ("lora",)], ids="-".join)
def test_one_rank_equals_two(folder, names):
    one, two = (load_model(folder / count / "-".join(names), "last") for count in ("one", "two"))
    assert one.info["pairs"] == two.info["pairs"] == 36
    assert_equal(one.model.state_dict(), two.model.state_dict(), ROUNDING)


@pytest.mark.parametrize("name", ["equal", "equal-queue"])
def test_equal_pairs_are_found_across_ranks(folder, name):
    shares = []
    for count in ("one", "two"):
        lines = [json.loads(line) for line in (folder / count / name / "log.jsonl").read_text().splitlines()]
        shares.append([line["equal_pairs"] for line in lines if line["kind"] == "train"])
    assert shares[0] == shares[1] and min(shares[0]) > 0


def test_ranks_validate_as_one(folder):
    best = [load_model(folder / count / "-".join(TOKENS), "best").info["validation"] for count in ("one", "two")]
    assert best[0] == pytest.approx(best[1], abs=1e-5)


def test_ranks_keep_the_same_queue_in_the_order_of_their_keys(folder):
    one = load_checkpoint(folder / "one" / "queue" / "last.pt")["pretraining"]
    first, second = (torch.load(folder / f"queue{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal(first, second)
    assert_equal(first, one, 1e-6)
    assert first["objectives.moco.written"] == 36


def test_what_any_rank_cannot_read_is_logged(folder):
    lines = [json.loads(line) for line in (folder / "two" / "bad" / "log.jsonl").read_text().splitlines()]
    assert sorted(line["record"] for line in lines if line["kind"] == "dropped") == ["r000", "r003", "r006", "r009"]
    assert next(line["dropped"] for line in lines if line["kind"] == "train") == 4


def test_gather_keeps_gradients(folder):
    for rank in (0, 1):
        gathered = torch.load(folder / f"gather{rank}.pt", weights_only=True)
        assert gathered["rows"][:, 0].tolist() == [0, 0, 1] and gathered["first"] == 2 * rank
        # Each row's gradient is the sum of what both ranks make of it: weights 1 and 2.
        wanted = torch.zeros(2, 3)
        wanted[: 2 - rank] = 3.0 * torch.arange(9).reshape(3, 3)[2 * rank : 2 * rank + 2]
        assert torch.equal(gathered["grad"], wanted)
