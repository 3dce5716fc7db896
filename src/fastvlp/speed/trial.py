"""A recipe that takes single training steps, on batches that are already made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree

from fastvlp.batch import Batch
from fastvlp.data.loader import Loader
from fastvlp.dist import Precision
from fastvlp.random import hash64
from fastvlp.speed.clock import Clock, Lap
from fastvlp.speed.memory import batch_bytes, held_bytes, peak_of_step, release
from fastvlp.training.blocks import compiled
from fastvlp.training.flops import FlopCounter
from fastvlp.training.loop import steps
from fastvlp.training.start import start
from fastvlp.training.state import StepReport, TrainState
from fastvlp.training.train_config import TrainConfig

# Seconds that measuring the loader alone may take.
LOADER_S = 20.0
# Seconds of steps over which the waiting for data is measured, from one step on.
WAITING_S = 10.0
# Seed of the rows of a batch that is made larger.
LARGER_SALT = 811


class Step(NamedTuple):
    """One step: what it took, its rows, predicted tokens and FLOPs, and its loss."""

    lap: Lap
    rows: int
    tokens: int
    flops: float
    loss: float


class Arm(Protocol):
    """Something whose steps are timed in turn with those of others."""

    @property
    def precision(self) -> Precision: ...

    def step(self) -> Step: ...

    def bytes(self) -> int:
        """Most bytes that are held at once in a step, with weights and the optimiser's state."""


@dataclass(kw_only=True)
class Loading:
    """The time to make the batches of a step.

    Attributes:
        s: seconds for the batches of one step.
        made: the batches.
    """

    s: float
    made: list[Batch]


class Trial:
    """A recipe on batches that are already made, on its device. Its steps are those of training: augmentation, all
    micro-batches, the optimiser and the averaged weights.

    Attributes:
        compile_s: seconds that PyTorch compiled until all batches were seen; what an earlier recipe compiled may serve this
            one too. None without `compile`.
    """

    def __init__(self, run: TrainConfig, batches: int):
        self.run = run
        self.state = start(run)
        self.loader = self.state.train
        self.loading = load(self.state, batches * run.accumulate)
        self._use(self.loading.made)
        self.state.flops = FlopCounter(self.state.model.config.image.tokens, every=0)
        self.whole = self.state.run
        before = compiled()[1] if run.compile else 0.0
        # Counted steps run uncompiled. Every shape of every objective is counted in the first pass over the batches, and
        # compiled in the second, so that a timed step does neither.
        for part in self.parts():
            self._follow(part)
            for _ in range(2 * batches):
                self.step()
        self.compile_s = compiled()[1] - before if run.compile else None
        self._follow(self.whole)

    @property
    def precision(self) -> Precision:
        return self.state.precision

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.state.pretraining.parameters() if p.requires_grad)

    def parts(self) -> list[TrainConfig]:
        """The runs whose steps the run's steps are: of a mix, one for each objective."""
        run = self.whole
        return [run] if run.mix is None else [replace(run, mix={name: 1.0}) for name in run.mix]

    def _follow(self, run: TrainConfig) -> None:
        """Makes the next steps those of `run`."""
        self.state.run = run
        self.reports = steps(self.state)

    def _use(self, batches: list[Batch]) -> None:
        """Makes the next steps those on these batches, in turn. They are made once, and a step of training holds its own."""
        self.state.train = ready(batches, self.run.seed)
        self.batch_bytes = self.run.accumulate * max(map(batch_bytes, batches))

    def step(self) -> Step:
        clock = Clock(self.state.device)
        report = next(self.reports)
        return as_step(report, clock.read())

    def bytes(self) -> int:
        extra = 0
        for part in self.parts():
            self._follow(part)
            with peak_of_step(self.state.device) as peak:
                self.step()
                extra = max(extra, peak())
        self._follow(self.whole)
        averaged = [] if self.state.ema is None else [self.state.ema]
        return held_bytes(self.state.optimiser, self.state.pretraining, *averaged) + self.batch_bytes + extra

    def data_wait(self, count: int) -> float:
        """Share of a step's time on the wall that waits for data, over up to `count` steps that read theirs as training does.
        Steps before them, in which the loader starts and whose batches it made at once, do not count."""
        ready_batches, flops = self.state.train, self.state.flops
        # Counting a new shape would make a step longer, and its wait a smaller share.
        self.state.train, self.state.flops = self.loader, FlopCounter(flops.image)
        reports = steps(self.state)
        first = made_ahead(self.whole) // self.state.division.micro + 1
        for _ in range(first):
            next(reports)
        taken = [next(reports)]
        while len(taken) < count and sum(one.seconds for one in taken) < WAITING_S:
            taken.append(next(reports))
        reports.close()
        self.state.train, self.state.flops = ready_batches, flops
        return sum(one.data_wait for one in taken) / max(1e-9, sum(one.seconds for one in taken))

    def largest_batch(self, limit: float, search: Callable[[Callable[[int], float], float, int], int]) -> int:
        """The most rows of a micro-batch whose step holds at most `limit` bytes. The trial cannot be used afterwards."""
        longest = max(self.loading.made, key=lambda batch: batch.ids.shape[1])
        return search(lambda rows: self._bytes_with(repeated(longest, rows)), limit, min(8, len(longest)))

    def _bytes_with(self, batch: Batch) -> float:
        self._use([batch])
        try:
            return self.bytes()
        except (torch.OutOfMemoryError, MemoryError):
            return math.inf
        finally:
            self.state.optimiser.zero_grad()
            release(self.state.device)

    def trace(self, path: Path) -> None:
        """Writes what one step runs, on processor and GPU, as a trace for chrome://tracing and Perfetto."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.state.device.type == "cuda" else [])
        with profile(activities=kinds) as recorded:
            self.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(path))


def as_step(report: StepReport, lap: Lap) -> Step:
    return Step(lap, report.pairs, report.tokens, report.flops, report.losses["loss"])


def load(state: TrainState, count: int) -> Loading:
    """Makes `count` batches as training does, timed: on a CPU in this thread, elsewhere by the run's workers."""
    made: list[Batch] = []
    if state.device.type == "cpu":
        clock = Clock(state.device)
        for s in range(count):
            made.append(state.train.make(state.train.rows(s))[0])
        return Loading(s=clock.read().cpu_s / count * state.run.accumulate, made=made)
    batches: Iterator[tuple[Batch, object]] = state.train.batches()
    ahead, cpu = made_ahead(state.run), torch.device("cpu")
    for number in range(max(count, ahead)):
        batch, _ = next(batches)
        made += [batch.to(state.device)] if number < count else []
    clock, taken = Clock(cpu), 0
    while taken < 2 * ahead and clock.read().wall_s < LOADER_S:
        next(batches)
        taken += 1
    return Loading(s=clock.read().wall_s / taken * state.run.accumulate, made=made)


def made_ahead(run: TrainConfig) -> int:
    """Batches that the loader makes at once, before the first is taken."""
    return 2 * run.data.workers + 2


def ready(batches: list[Batch], seed: int) -> Loader:
    """A loader of batches that are already made, in turn."""
    return Loader(len(batches), lambda rows: (batches[rows[0].index], []), batch_size=1, seed=seed)


def repeated(batch: Batch, rows: int) -> Batch:
    """A batch of so many rows, the first of which are its own: the others repeat them with other seeds and other hashes of
    their content, so that they are other pairs."""
    index = torch.arange(rows) % len(batch)
    larger: Batch = _pytree.tree_map_only(Tensor, lambda x: x[index.to(x.device)], batch)
    number = torch.arange(rows)
    seed = torch.tensor([hash64(LARGER_SALT, i) for i in number.tolist()]).to(batch.seed)
    content = None if batch.content is None else torch.stack([2 * number, 2 * number + 1], 1).to(batch.seed)
    return replace(larger, seed=seed, content=content)
