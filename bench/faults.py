"""Try what ends runs: kills at random moments, a full disk, few file handles, dead loader processes and ranks.

    python bench/faults.py --count 50
    python bench/faults.py --sections killed_runs dead_rank --count 8

Runs of tiny models, in forks of one process that has imported PyTorch.

`killed_runs`: `count` runs, of FLM, of FLIP with gradient caching, of a momentum queue as in BriVL, and of a mix of
objectives as in UNITER, on one rank and on two, are killed up to three times each at random moments and resumed. Then
weights, averages and moments equal those of the uninterrupted run bit for bit. The other sections: the cause is named
within 60 s, the checkpoint stays whole, and the run then ends as the uninterrupted one. Prints how many were tried,
survived and lost; exits with 1 if any was lost.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

# Before PyTorch is imported: results do not depend on the number of cores, and no GPU is used.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastvlp.data.pairs import PairMaker
from fastvlp.errors import UserError
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.training.checkpoint import load_checkpoint
from fastvlp.training.loop import train
from fastvlp.training.train_config import TrainConfig
from tests.training.runs import made_pairs, made_run

FORK = multiprocessing.get_context("fork")
# No fault may take longer than this to end a run with its cause.
LIMIT_S = 60.0


@dataclass
class Tally:
    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, what: str, wrong: str | None) -> None:
        self.tried += 1
        if wrong is not None:
            self.lost.append(f"{what}: {wrong}")


def recipes(pairs: Path, out: Path) -> dict[str, TrainConfig]:
    """Tiny runs of each kind."""
    common: dict[str, Any] = {
        "steps": 12, "batch_size": 4, "threads": 1, "checkpoint_every": 3, "validate_every": 4, "dropout": 0.1
    }  # fmt: skip
    flip = made_run(pairs, out / "flip", "clip", accumulate=2, keep=0.5, **common)
    mix = made_run(pairs, out / "mix", "mlm", mix={"mlm": 2.0, "itm": 1.0, "clip": 1.0}, **common)
    embed = flip.model.embed
    return {
        "flm": made_run(pairs, out / "flm", "flm", ema=0.9, **common),
        "flip": replace(flip, objectives={"clip": CLIPConfig(bound="clip")}),
        "brivl": made_run(pairs, out / "brivl", "moco", **common),
        "mix": replace(
            mix,
            model=replace(mix.model, embed=embed),
            objectives={**mix.objectives, "itm": ITMConfig(), "clip": CLIPConfig()},
        ),
    }


def as_child(run: TrainConfig, rank: int, world: int, port: int, said: Path, before: Callable[[], None]) -> None:
    """Trains or resumes in this fork; what it says goes into a file. Exits with 2 after a UserError, like the command line."""
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before()
    try:
        train(run, resume=True)
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(2)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def begin(run: TrainConfig, world: int, before: Callable[[], None] = lambda: None) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = Path(f"{run.folder}.txt")
    children: list[BaseProcess] = [
        FORK.Process(target=as_child, args=(run, r, world, port, said, before)) for r in range(world)
    ]
    for child in children:
        child.start()
    return children


def ended(children: list[BaseProcess], seconds: float) -> bool:
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    return all(child.exitcode is not None for child in children)


def kill(children: list[BaseProcess]) -> None:
    for child in children:
        child.kill()
        child.join()


def to_its_end(run: TrainConfig, world: int = 1) -> str | None:
    """Trains or resumes; returns what went wrong."""
    children = begin(run, world)
    if not ended(children, 10 * LIMIT_S):
        kill(children)
        return "hangs"
    if any(child.exitcode for child in children):
        return Path(f"{run.folder}.txt").read_text().strip().splitlines()[-1][:200]
    return None


def differ(left: Any, right: Any, path: str = "") -> str | None:
    """The first place at which two checkpoints differ."""
    if isinstance(left, torch.Tensor):
        return None if torch.equal(left, right) else path
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return path
        return next((d for k in left if (d := differ(left[k], right[k], f"{path}.{k}"))), None)
    if isinstance(left, list | tuple):
        return next((d for i, (a, b) in enumerate(zip(left, right)) if (d := differ(a, b, f"{path}.{i}"))), None)
    return None if left == right else path


def compare(run: TrainConfig, straight: TrainConfig) -> str | None:
    """What differs between the ends of two runs, but for the clock."""
    parts = ("pretraining", "optimiser", "ema", "step", "pairs", "tokens", "best")
    left, right = (load_checkpoint(folder / "last.pt") for folder in (run.folder, straight.folder))
    place = differ({name: left[name] for name in parts}, {name: right[name] for name in parts})
    return None if place is None else f"differs at {place}"


class Bench:
    def __init__(self, work: Path, count: int, seed: int):
        self.work, self.count, self.random = work, count, Random(seed)
        self.pairs = made_pairs(work / "pairs", 22)
        self._straight: dict[tuple[str, int], tuple[TrainConfig, float]] = {}

    def run(self, kind: str, name: str, **changes: Any) -> TrainConfig:
        return replace(recipes(self.pairs, self.work)[kind], out=str(self.work / name), **changes)

    def straight(self, kind: str, world: int = 1) -> tuple[TrainConfig, float]:
        """The uninterrupted run, and the seconds that it takes."""
        if (kind, world) not in self._straight:
            run, began = self.run(kind, f"straight-{kind}-{world}"), time.monotonic()
            wrong = to_its_end(run, world)
            assert wrong is None, wrong
            self._straight[kind, world] = run, time.monotonic() - began
        return self._straight[kind, world]

    def killed_runs(self, tally: Tally) -> None:
        kinds = [(kind, world) for kind in recipes(self.pairs, self.work) for world in (1, 2)]
        for i in range(self.count):
            kind, world = kinds[i % len(kinds)]
            straight, seconds = self.straight(kind, world)
            run = self.run(kind, f"killed-{i}")
            for _ in range(self.random.randint(1, 3)):
                children = begin(run, world)
                ended(children, self.random.uniform(0, seconds))
                kill(children)
            tally.add(f"{kind} on {world} ranks, run {i}", to_its_end(run, world) or compare(run, straight))

    def _stopped(
        self, name: str, before: Callable[[], None], cause: str, tally: Tally, *, world: int = 1, **changes: Any
    ) -> None:
        """A run with a fault ends with its cause in time, and then resumes to the end of the uninterrupted one."""
        straight, _ = self.straight("flm", world)
        run = self.run("flm", name)
        changed = replace(run, data=replace(run.data, **changes))
        children, began = begin(changed, world, before), time.monotonic()
        in_time = ended(children, LIMIT_S)
        kill(children)
        said = Path(f"{run.folder}.txt").read_text()
        wrong = None if in_time else f"not ended after {LIMIT_S:.0f} s"
        if wrong is None and cause not in said:
            wrong = f"{cause!r} is not said: {said.strip().splitlines()[-1][:200] if said.strip() else 'nothing'}"
        tally.add(
            f"{name} ({time.monotonic() - began:.0f} s)", wrong or to_its_end(run, world) or compare(run, straight)
        )

    def full_disk(self, tally: Tally) -> None:
        """Files may not grow beyond a limit, of several sizes: the log or the checkpoint is the one that does not fit."""
        for kilobytes in (1, 40, 300, 900):

            def limit(kilobytes: int = kilobytes) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))

            self._stopped(f"full-{kilobytes}k", limit, "", tally)

    def few_handles(self, tally: Tally) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

        self._stopped("handles", limit, "`ulimit -n", tally, workers=2)

    def dead_worker(self, tally: Tally) -> None:
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS):
            make, parent = PairMaker.__call__, [0]

            def dies(self: PairMaker, rows: Any, number: int = number, make: Any = make, parent: Any = parent) -> Any:
                # The fifth batch that a loader process makes; validation has two.
                parent[0] += 1
                if parent[0] == 5 and multiprocessing.parent_process() is not None and os.getpid() != parent[1]:
                    os.kill(os.getpid(), number)
                return make(self, rows)

            def patch(dies: Any = dies, parent: Any = parent) -> None:
                parent.append(os.getpid())
                PairMaker.__call__ = dies  # type: ignore[method-assign]

            self._stopped(
                f"worker-{signal.Signals(number).name}",
                patch,
                f"killed by {signal.Signals(number).name}",
                tally,
                workers=1,
            )

    def dead_rank(self, tally: Tally) -> None:
        """One of two ranks is killed in the middle: the other ends too, and the checkpoint is whole."""
        straight, seconds = self.straight("flm", 2)
        for i, victim in enumerate((0, 1)):
            run = self.run("flm", f"rank-{victim}")
            children = begin(run, 2)
            ended(children, seconds * self.random.uniform(0.5, 0.9))
            children[victim].kill()
            in_time = ended(children, LIMIT_S)
            kill(children)
            wrong = None if in_time else f"the other rank has not ended after {LIMIT_S:.0f} s"
            tally.add(f"rank {victim} killed, run {i}", wrong or to_its_end(run, 2) or compare(run, straight))


SECTIONS = ("killed_runs", "full_disk", "few_handles", "dead_worker", "dead_rank")


def main(sections: tuple[str, ...] = SECTIONS, count: int = 200, seed: int = 0) -> int:
    """Try what ends runs.

    Args:
        sections: Which parts to try.
        count: Runs that are killed.
        seed: Of the moments at which they are.
    """
    table, lost = Table("section", "tried", "survived", "lost"), []
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), count, seed)
        for section in sections:
            tally = Tally()
            getattr(bench, section)(tally)
            table.add_row(section, str(tally.tried), str(tally.tried - len(tally.lost)), str(len(tally.lost)))
            lost += tally.lost
            print("\n".join([f"{section}: {tally.tried} tried, {len(tally.lost)} lost", *tally.lost]), flush=True)
    Console().print(table)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
