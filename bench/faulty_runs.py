"""Faults that end runs: kills at random moments, full and read-only disks, few file handles, dead loader processes and ranks.

The sections of `faults.py` about runs. They are runs of tiny models, in forks of one process that has imported PyTorch.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

# Before PyTorch is imported: results do not depend on the number of cores, and no GPU is used.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # which the first optimiser imports: here once, and not in each fork
from unwritable import Mounts, without_override

from fastvlp.data.pairs import PairMaker
from fastvlp.errors import UserError
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.itm import ITMConfig
from fastvlp.training.checkpoint import CHECKPOINT, load_checkpoint
from fastvlp.training.loop import train
from fastvlp.training.train_config import TrainConfig
from tests.training.runs import made_pairs, made_run

FORK = multiprocessing.get_context("fork")
# No fault may take longer than this to end a run with its cause.
LIMIT_S = 60.0


@dataclass
class Tally:
    """Results of a section: the number of faults that were tried, those that were lost and why, the seconds after which
    the slowest run had ended with its cause, and the faults that could not be tried here."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    slowest_s: float | None = None
    left_out: list[str] = field(default_factory=list)

    def add(self, what: str, wrong: str | None, seconds: float | None = None) -> None:
        self.tried += 1
        if seconds is not None:
            self.slowest_s = max(self.slowest_s or 0.0, seconds)
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


def said_by(run: TrainConfig) -> Path:
    """The file of what the processes of a run print. It is beside the data: the run's own folder may be unwritable."""
    return Path(str(run.data.train)).parents[1] / f"{run.name}.txt"


def as_child(run: TrainConfig, rank: int, world: int, port: int, before: Callable[[], None]) -> None:
    """Trains or resumes in this fork; what it says goes into a file. Exits with 2 after a UserError, like the command line."""
    with said_by(run).open("a") as file:
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
    children: list[BaseProcess] = [
        FORK.Process(target=as_child, args=(run, r, world, port, before)) for r in range(world)
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
        return said_by(run).read_text().strip().splitlines()[-1][:200]
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
    """Returns the differences between the ends of two runs, except in times."""
    parts = ("pretraining", "optimiser", "ema", "step", "pairs", "tokens", "best")
    left, right = (load_checkpoint(folder / "last.pt") for folder in (run.folder, straight.folder))
    place = differ({name: left[name] for name in parts}, {name: right[name] for name in parts})
    return None if place is None else f"differs at {place}"


class FaultyRuns:
    """Each section is a method that fills a tally. `count`: runs that are killed; `seed`: of the moments at which they are."""

    def __init__(self, work: Path, count: int, seed: int):
        self.work, self.count, self.random = work, count, Random(seed)
        self.mounts = Mounts()
        self.pairs = made_pairs(work / "pairs", 22)
        self._straight: dict[tuple[str, int], tuple[TrainConfig, float]] = {}

    def run(self, kind: str, name: str, **changes: Any) -> TrainConfig:
        made = recipes(self.pairs, self.work)[kind]
        return replace(made, name=name.replace("/", " "), out=str(self.work / name), **changes)

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
        self,
        name: str,
        cause: str,
        tally: Tally,
        *,
        before: Callable[[], None] = lambda: None,
        during: Callable[[Path], None] | None = None,
        after: Callable[[Path], None] = lambda _: None,
        saved: bool = False,
        **changes: Any,
    ) -> None:
        """A run with a fault ends with its cause in time and with a whole checkpoint, if it had saved one, and then resumes to
        the end of the uninterrupted one.

        before: makes the fault, in the process of the run.
        during: makes it in this process, after the first checkpoint.
        after: removes it.
        saved: whether a checkpoint is there for certain.
        changes: of the run's data.
        """
        straight, _ = self.straight("flm")
        run = self.run("flm", name)
        changed = replace(run, data=replace(run.data, **changes))
        children, began = begin(changed, 1, before), time.monotonic()
        if during is not None:
            began = self._in_the_middle(run, children, during)
        in_time = ended(children, LIMIT_S)
        kill(children)
        seconds = time.monotonic() - began
        wrong = None if in_time else f"not ended after {LIMIT_S:.0f} s"
        wrong = wrong or self._cause(run, cause) or self._checkpoint(run, saved or during is not None)
        after(run.folder)
        tally.add(name, wrong or to_its_end(run) or compare(run, straight), seconds)

    def _in_the_middle(self, run: TrainConfig, children: list[BaseProcess], during: Callable[[Path], None]) -> float:
        """Makes the fault once the run has saved a checkpoint, while it is stopped; at the latest after LIMIT_S. Returns the
        time."""
        end = time.monotonic() + LIMIT_S
        while not (run.folder / CHECKPOINT).exists() and any(child.exitcode is None for child in children):
            if time.monotonic() > end:
                break
            time.sleep(0.002)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child.pid or 0, number)
            if number == signal.SIGSTOP:
                during(run.folder)
        return time.monotonic()

    def _cause(self, run: TrainConfig, cause: str) -> str | None:
        """Returns the fault in the last output of a run; None if there is none."""
        said = [line for line in said_by(run).read_text().splitlines() if line.strip()]
        if any(line.startswith("error: ") and cause in line for line in said):
            return None
        return f"{cause!r} is not said: {said[-1][:300] if said else 'nothing'}"

    def _checkpoint(self, run: TrainConfig, saved: bool) -> str | None:
        """Returns the fault in the checkpoint of a run that was interrupted; there may be no checkpoint if none was `saved`."""
        if not (run.folder / CHECKPOINT).exists():
            return "no checkpoint" if saved else None
        try:
            return None if load_checkpoint(run.folder / CHECKPOINT)["step"] > 0 else "a checkpoint without a step"
        except UserError as error:
            return f"checkpoint lost: {error}"

    def full_disk(self, tally: Tally) -> None:
        """Files may not grow beyond a limit, or the file system has no more room, of several sizes: the config, the log or the
        checkpoint is what does not fit."""
        for kilobytes in (1, 40, 300, 900):

            def limit(kilobytes: int = kilobytes) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))

            self._stopped(f"files of {kilobytes} kB", "`ulimit -f`", tally, before=limit)
        for kilobytes in (4, 16, 1000, 1300, 2000):
            name = f"disk of {kilobytes} kB"
            if not self.mounts.small(self.work / name, kilobytes):
                tally.left_out.append(f"{name}: may not mount")
                continue
            self._stopped(name, "free space", tally, after=self.mounts.enlarge, saved=kilobytes == 2000)
            self.mounts.uncover(self.work / name)

    def read_only(self, tally: Tally) -> None:
        """A run's folder, or the disk that it is on, cannot be written: from the beginning, from the middle, or as a run
        resumes."""
        folder = self.work / "forbidden"
        folder.mkdir(mode=0o555)
        forbidden = {"before": without_override, "cause": "ask for the permission", "tally": tally}
        self._stopped("forbidden/run", after=lambda _: folder.chmod(0o755), **forbidden)
        self._stopped(
            "forbidden in the middle",
            during=lambda run: run.chmod(0o555),
            after=lambda run: run.chmod(0o755),
            **forbidden,
        )
        self._half_a_run("forbidden as it resumes").chmod(0o555)
        self._stopped("forbidden as it resumes", after=lambda run: run.chmod(0o755), saved=True, **forbidden)
        file = self.work / "file"
        file.write_text("no folder")
        self._stopped("file/run", "choose another", tally, after=lambda _: file.unlink())
        if not self.mounts.allowed:
            tally.left_out.append("read-only disks: may not mount")
            return
        folder = self.work / "disk"
        folder.mkdir()
        read_only = {"cause": "read-only here", "tally": tally, "after": self.mounts.uncover}
        self.mounts.cover(folder)
        self._stopped("disk/run", **read_only | {"after": lambda _: self.mounts.uncover(folder)})
        self._stopped("disk in the middle", during=self.mounts.cover, **read_only)
        self.mounts.cover(self._half_a_run("disk as it resumes"))
        self._stopped("disk as it resumes", saved=True, **read_only)

    def _half_a_run(self, name: str) -> Path:
        """The folder of a run that was killed after its first checkpoint."""
        run = self.run("flm", name)
        children = begin(run, 1)
        self._in_the_middle(run, children, lambda _: None)
        kill(children)
        return run.folder

    def few_handles(self, tally: Tally) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

        self._stopped("40 handles", "`ulimit -n", tally, before=limit, workers=2)

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

            name = signal.Signals(number).name
            self._stopped(f"worker {name}", f"killed by {name}", tally, before=patch, saved=True, workers=1)

    def dead_rank(self, tally: Tally) -> None:
        """One of two ranks is killed in the middle: the other ends with the cause, and the checkpoint is whole."""
        straight, _ = self.straight("flm", 2)
        for victim in (0, 1):
            run = self.run("flm", f"rank-{victim}")
            children = begin(run, 2)
            began = self._in_the_middle(run, children, lambda _, child=children[victim]: child.kill())
            in_time = ended(children, LIMIT_S)
            kill(children)
            seconds = time.monotonic() - began
            wrong = None if in_time else f"the other rank has not ended after {LIMIT_S:.0f} s"
            wrong = wrong or self._cause(run, "another rank") or self._checkpoint(run, saved=True)
            tally.add(f"rank {victim} killed", wrong or to_its_end(run, 2) or compare(run, straight), seconds)
