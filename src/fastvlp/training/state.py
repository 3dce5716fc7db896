"""The state of a run (TrainState), and the report of one step (StepReport)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastvlp.data.loader import Loader
from fastvlp.data.stores import Stored
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import Precision, pick_precision
from fastvlp.model.model import VLModel
from fastvlp.model.saving import Inheritance
from fastvlp.training.division import Division
from fastvlp.training.flops import FlopCounter
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.train_config import TrainConfig
from fastvlp.writer_lock import WriterLock

if TYPE_CHECKING:
    from fastvlp.training.sharding import Sharding


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of all ranks.

    Attributes:
        losses: `loss`, which was minimised: the sum of weight * mean over its terms; and the mean of each term.
        lr: learning rate of the encoders; if layers learn at different rates, that of the last layers.
        pairs: number of rows of the step.
        equal_pairs: number of rows whose text or image also belongs to another row of the step; None if no objective contrasts
            rows.
        tokens: number of targets of all losses.
        seconds: duration of the step, of which `data_wait` seconds were spent waiting for batches.
        flops: floating-point operations of this rank.
        grad_norm: norm of the gradient before it was clipped.
        skipped: whether the loss or its gradient was not finite, so that the weights were not changed.
        dropped: records that were found unreadable for the first time, with the reason.
    """

    step: int
    losses: dict[str, float]
    lr: float
    pairs: int
    tokens: int
    seconds: float
    data_wait: float
    flops: float
    grad_norm: float
    skipped: bool
    dropped: dict[str, str]
    equal_pairs: int | None = None


@dataclass(kw_only=True)
class TrainState:
    """The state of a run.

    Attributes:
        wrapped: `pretraining`, wrapped by DDP if there are several ranks that each have all weights.
        ema: the averaged weights; None if the run does not average.
        elapsed: seconds of training, the same on all ranks.
        pairs: number of rows of all ranks so far.
        tokens: number of targets of all losses and ranks so far.
        dropped: unreadable records and missing parts of damaged shards, with the reason.
        bad_steps: number of the last steps that were all skipped.
        skipped: number of steps that were skipped so far.
        best: lowest validation loss so far.
        stale: number of validations since then.
        validated: step of the last validation.
        inherited: which of the weights that the run started from were taken over; None without such weights.
        stored: the stored states of frozen encoders; None if there are none.
        earlier_length: length of a resumed run when it was saved.
        contents: hashes of the records of the splits train and val; None if that is not known.
        changed: the fields that the user allowed a resumed run to change: (then, now) by name.
        remeasured: the changed fields of a resumed run that decide what validation measures; its lowest loss is then reset.
        skipped_batches: in a resumed run whose batches differ, the number of batches that were already read, beyond those of
            its steps.
        flops: counts the FLOPs of the steps.
        signal: the signal that this process received, if any.
        stop: the signal for which all ranks stop.
        saved: the step of the last checkpoint; 0 if there is none.
        saving: the save that is not finished yet, or has failed; it returns its step.
        clock: function that returns the seconds by which `elapsed` grows; a comparison on a CPU counts CPU time.
        division: how the batches of a step are divided among the ranks.
        sharding: how weights are divided among the ranks; None if each has all.
        lock: lock of the run's folder, so that only one process writes to it; None if nothing is locked.
        notes: plain values of the caller, which are saved and restored with the state.
        recomputes: number of layers of each part of the model that are computed again in the backward pass.
        between_steps: whether the weights are those after `step`; false while a step changes them.
    """

    run: TrainConfig
    device: torch.device
    tokenizer: Tokenizer
    model: VLModel
    pretraining: Pretraining
    wrapped: nn.Module
    optimiser: torch.optim.Optimizer
    ema: AveragedModel | None
    train: Loader
    val: Loader | None
    division: Division
    step: int = 0
    elapsed: float = 0.0
    pairs: int = 0
    tokens: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    bad_steps: int = 0
    skipped: int = 0
    best: float = math.inf
    stale: int = 0
    validated: int = 0
    inherited: Inheritance | None = None
    stored: Stored | None = None
    earlier_length: str | None = None
    contents: dict[str, str | None] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    remeasured: tuple[str, ...] = ()
    skipped_batches: int = 0
    flops: FlopCounter = field(default_factory=FlopCounter)
    signal: int | None = None
    stop: int | None = None
    saved: int = 0
    saving: Future[int] | None = None
    between_steps: bool = True
    sharding: Sharding | None = None
    lock: WriterLock | None = None
    clock: Callable[[], float] = time.perf_counter
    notes: dict[str, Any] = field(default_factory=dict)
    recomputes: dict[str, int] = field(default_factory=dict)

    @property
    def precision(self) -> Precision:
        return pick_precision(self.run.precision, self.device)

    @property
    def batches(self) -> int:
        """The number of the next batch on each rank."""
        return self.skipped_batches + self.step * self.division.micro

    @property
    def out_of_patience(self) -> bool:
        """Whether the run ends early, because its validation loss no longer falls."""
        return self.run.patience is not None and self.stale >= self.run.patience

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.out_of_patience:
            return 1.0
        if self.run.steps is not None:
            return self.step / self.run.steps
        return self.elapsed / (self.run.budget_s or math.inf)

    @property
    def midway(self) -> float:
        """Progress in the middle of the next step, which the schedule uses, so that no step has a learning rate of 0. The
        exception is the first step of a run by the clock, because the time of a step is not known yet."""
        if self.run.steps is not None:
            return (self.step + 0.5) / self.run.steps
        pace = self.elapsed / self.step if self.step else 0.0
        return (self.elapsed + pace / 2) / (self.run.budget_s or math.inf)

    @property
    def evaluated(self) -> Pretraining:
        """The module that is validated and saved: the averaged weights if there are any."""
        return cast(Pretraining, self.ema.module) if self.ema is not None else self.pretraining


def autocast(state: TrainState) -> torch.autocast:
    return torch.autocast(state.device.type, torch.bfloat16, enabled=state.precision == "bf16")


def due(every: int | None, step: int) -> bool:
    return every is not None and step > 0 and step % every == 0


def validates(state: TrainState) -> bool:
    """Whether the run validates after the step at which it stands."""
    return due(state.run.validate_every, state.step) or state.progress >= 1
