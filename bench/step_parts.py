"""Where the time of a training step goes: the CPU time and the FLOPs of each part, for several objectives that take turns.

    python bench/step_parts.py --data demo/easy --arms flm_demo mlm_demo ar_demo cappa_demo

Each part is run by itself, forward and then backward, on states that are cut off from those before them, so that its gradient
is timed too. Parts are the draws and everything else that belongs to no model part (`other`), the image encoder, the text
encoder, the fusion layers, the reconstructor, the vocabulary head with its loss, and clipping with the optimiser. The floor is
what the FLOPs would take at the rate of one of the step's own matrix products, alone. Medians over steps; one thread. Rows are
appended to bench/results/step_parts.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree

from fastvlp import recipe
from fastvlp.batch import Batch
from fastvlp.objectives import ar, cappa, flm, mlm
from fastvlp.objectives.objective import combine
from fastvlp.training.flops import Flops
from fastvlp.training.loop import start
from fastvlp.training.state import TrainState, autocast

Precision = Literal["fp32", "bf16"]
PARTS = ("other", "image", "text", "fusion", "reconstructor", "head", "optimiser")
LOSS_USERS = (ar, cappa, flm, mlm)


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Path
    """Folder of the embedded corpus, with its splits."""
    arms: tuple[str, ...] = ("flm_demo", "mlm_demo", "ar_demo", "cappa_demo")
    """Recipes."""
    patch: int = 8
    """Side of a patch in pixels."""
    group: int | None = None
    """Batches by length, from groups of so many rows."""
    batch: int = 32
    """Rows of a step."""
    steps: int = 40
    """Timed steps of each arm."""
    precision: Precision = "bf16"
    """Number type of matrix products."""
    out: Path = RESULTS / "step_parts.jsonl"
    """File that rows are appended to."""


@dataclass
class Stages:
    """Runs parts cut off from each other, and adds up the seconds of each.

    Attributes:
        seconds, flops: of each part, forward and backward.
        counter: counts the FLOPs, where they are counted.
        cut: for the backward pass, in the order in which the parts ended: name, outputs, and the same cut off.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    counter: Flops | None = None
    cut: list[tuple[str, list[Tensor], list[Tensor]]] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def _switch(self) -> None:
        """Adds the time since the last switch to the part that is open."""
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
            if self.counter is not None:
                self.flops[self._open[-1]] += self.counter.total
                self.counter.total = 0
        self._since = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        yield
        self._switch()
        self._open.pop()

    def staged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a part: its outputs are cut off from its inputs."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                result = function(*args, **kwargs)
            leaves, spec = _pytree.tree_flatten(result)
            whole = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            ends = {id(x): x.detach().requires_grad_() for x in whole}
            self.cut.append((name, list({id(x): x for x in whole}.values()), list(ends.values())))
            return _pytree.tree_unflatten([ends.get(id(x), x) for x in leaves], spec)

        return run

    def backward(self, loss: Tensor) -> None:
        with self.part("other"):
            loss.backward()
        for name, outputs, ends in reversed(self.cut):
            pairs = [(x, end.grad) for x, end in zip(outputs, ends) if end.grad is not None]
            with self.part(name):
                torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
        self.cut.clear()


def cut_into_parts(state: TrainState, stages: Stages) -> None:
    """Replaces the functions of the model by staged ones."""
    model = state.model
    model.encode_image = stages.staged("image", model.encode_image)  # type: ignore[method-assign]
    model.text.states = stages.staged("text", model.text.states)  # type: ignore[method-assign]
    model.streams = stages.staged("fusion", model.streams)  # type: ignore[method-assign]
    model.read = stages.staged("fusion", model.read)  # type: ignore[method-assign]
    model.reconstruct = stages.staged("reconstructor", model.reconstruct)  # type: ignore[method-assign]


HEAD_LOSS = flm.head_loss


def step(state: TrainState, stages: Stages, batch: Batch) -> None:
    """One step of training, in parts."""
    for module in LOSS_USERS:
        module.head_loss = stages.staged("head", HEAD_LOSS)  # type: ignore[attr-defined]
    with stages.part("other"), autocast(state):
        counts = state.pretraining.counts(batch)
        loss = combine(state.pretraining(batch), counts)
    stages.backward(loss)
    with stages.part("optimiser"):
        clip_grad_norm_(state.pretraining.parameters(), 1.0)
        state.optimiser.step()
        state.optimiser.zero_grad()


def prepared(o: Options, name: str) -> TrainState:
    run = recipe(name)
    image = replace(run.model.image, patch=o.patch)  # type: ignore[call-arg]
    data = replace(run.data, train=str(o.data / "train"), val=None, batch_size=o.batch, workers=0, group=o.group)  # type: ignore[call-arg]
    run = replace(run, model=replace(run.model, image=image), data=data, budget_s=None, steps=1 << 20)
    return start(replace(run, validate_every=None, precision=o.precision, threads=1))


def rate(precision: Precision) -> float:
    """FLOPs a second of a matrix product as in a block: 1,024 rows of width 96 by 384 columns."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(1024, 96, dtype=kind), torch.randn(96, 384, dtype=kind)
    seconds = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(20):
            x @ weight
        seconds.append(time.process_time() - began)
    return 20 * 2 * x.numel() * weight.shape[1] / statistics.median(seconds)


def main(o: Options) -> None:
    torch.set_num_threads(1)
    states = {name: prepared(o, name) for name in o.arms}
    loader = states[o.arms[0]].train.batches()
    batches = [next(loader)[0] for _ in range(o.steps)]
    # The loader's thread must not work while steps are timed.
    del loader
    stages = {name: Stages() for name in o.arms}
    for name, state in states.items():
        cut_into_parts(state, stages[name])
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in o.arms}
    for number in range(-3, o.steps):
        for name in o.arms[:: 1 if number % 2 else -1]:
            stages[name].seconds = dict.fromkeys(PARTS, 0.0)
            step(states[name], stages[name], batches[number])
            if number >= 0:
                seconds[name].append(stages[name].seconds)
    show(o, seconds, {name: counted(states[name], stages[name], batches) for name in o.arms})


def counted(state: TrainState, stages: Stages, batches: Sequence[Batch]) -> dict[str, float]:
    """FLOPs of each part, the mean over the batches."""
    stages.flops = dict.fromkeys(PARTS, 0)
    with Flops() as stages.counter:
        for batch in batches:
            step(state, stages, batch)
    return {part: count / len(batches) for part, count in stages.flops.items()}


def show(o: Options, seconds: Mapping[str, list[dict[str, float]]], flops: Mapping[str, Mapping[str, float]]) -> None:
    speed, rows = rate(o.precision), []
    table = Table(title=f"batch {o.batch}, patch {o.patch}, {o.precision}; floor at {speed / 1e9:.0f} GFLOP/s")
    for column in ("part", *(f"{name} {what}" for name in o.arms for what in ("ms", "MFLOP", "floor ms"))):
        table.add_column(column, justify="right")
    for part in (*PARTS, "all"):
        parts = PARTS if part == "all" else (part,)
        cells = []
        for name in o.arms:
            ms = 1e3 * statistics.median(sum(one[p] for p in parts) for one in seconds[name])
            count = sum(flops[name][p] for p in parts)
            cells += [f"{ms:.1f}", f"{count / 1e6:.0f}", f"{1e3 * count / speed:.1f}"]
            rows.append({"arm": name, "part": part, "ms": ms, "flops": count, "floor_ms": 1e3 * count / speed})
        table.add_row(part, *cells)
    Console(width=160).print(table)
    options = {field: value for field, value in asdict(o).items() if field not in ("arms", "out", "data")}
    append(o.out, [stamp("cpu", "step_parts.py") | options | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
