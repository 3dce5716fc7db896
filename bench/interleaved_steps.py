"""Time training steps of several arms that take turns, for contrastive_time_and_memory.py: options, batches, clock, rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from records import RESULTS as RESULTS_FOLDER
from records import append, stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.sizes import with_tokenizer
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.training.pretraining import Pretraining

RESULTS = RESULTS_FOLDER / "contrastive_time_and_memory.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: under autocast, with weights in fp32."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of the random batches."""
    out: Path = RESULTS
    """File that rows are appended to."""

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def autocast(self) -> Any:
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Laps:
    """Measures seconds between calls: CPU time of this process, or the time between CUDA events."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.marks: list[Any] = []
        self()

    def __call__(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.process_time())
        if self.cuda:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        if not self.cuda:
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.marks)]


def in_turn(names: Sequence[str], repetitions: int, run: Callable[[int, str], Row]) -> dict[str, list[Row]]:
    """Calls run(number, name) for each arm in turn, in alternating order, and returns each arm's results.

    The results of two warm-up rounds are left out, except where there is only one repetition, which has no warm-up."""
    results: dict[str, list[Row]] = {name: [] for name in names}
    for number in range(-2 if repetitions > 1 else 0, repetitions):
        for name in names[:: 1 if number % 2 else -1]:
            row = run(max(0, number), name)
            if number >= 0:
                results[name].append(row)
    return results


def medians(rows: Sequence[Row]) -> Row:
    """The median of each field."""
    return {field: statistics.median(row[field] for row in rows) for field in rows[0]}


def ratio(over: Sequence[Row], under: Sequence[Row], field: str) -> float:
    """The median of the ratios of neighbouring steps."""
    return statistics.median(a[field] / b[field] for a, b in zip(over, under))


def step(o: Options, loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> Row:
    """Runs one step; returns its seconds, and those of its forward and backward pass alone."""
    lap = Laps(o.cuda)
    with o.autocast():
        total = loss()
    total.backward()
    lap()
    optimiser.step()
    optimiser.zero_grad()
    lap()
    gradient, update = lap.seconds()
    return {"step_s": gradient + update, "gradient_s": gradient}


def with_vocabulary_and_layers(config: ModelConfig, vocab: int, layers: int | None) -> ModelConfig:
    config = with_tokenizer(config, SimpleNamespace(vocab_size=vocab, pad=0, bos=1, eos=vocab - 1, mask=2))
    if layers is None:
        return config
    return replace(config, image=replace(config.image, depth=layers), text=replace(config.text, depth=layers))


def random_batch(o: Options, config: ModelConfig, rows: int, number: int = 0, length: int | None = None) -> Batch:
    """Random images, and captions of 5 to 25 tokens, 13 on average, as in COCO; as wide as the longest one, or `length`."""
    random = torch.Generator().manual_seed(o.seed * 1000 + number)
    length_B = (2 + torch.poisson(torch.full((rows,), 11.0), generator=random).long()).clamp(5, 25)
    L = length or int(length_B.max())
    text, position = config.text, torch.arange(L)
    ids = torch.randint(3, text.vocab - 1, (rows, L), generator=random)
    ids[:, 0] = text.bos
    ids = ids.masked_fill(position == length_B[:, None] - 1, text.eos)
    ids = ids.masked_fill(position >= length_B[:, None], text.pad)
    side = config.image.size
    image = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=random)
    seed = torch.randint(0, 1 << 60, (rows,), generator=random)
    # A loader hashes each image once in a run, so that the hashes come with the batch.
    content = torch.arange(2 * rows).view(rows, 2)
    return Batch(image=image, ids=ids, length=length_B, seed=seed, content=content).to(o.device)


def build_training(o: Options, config: ModelConfig) -> tuple[Pretraining, torch.optim.Optimizer]:
    with torch.device(o.device):
        training = Pretraining(VLModel(config), {"clip": CLIPConfig().build(config, SimpleNamespace())}).train()
    return training, torch.optim.AdamW(training.parameters(), lr=1e-5, fused=True)


def show(title: str, rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> None:
    """Prints a table. columns: title -> (field of a row, format)."""
    table = Table(title=title)
    table.add_column("arm")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [(row.get(field), spec) for field, spec in columns.values()]
        table.add_row(row["arm"], *("-" if value is None else format(value, spec) for value, spec in cells))
    Console().print(table)


def save(o: Options, part: str, rows: Sequence[Row]) -> None:
    """Appends the rows, with the options and the stamp. part: the command of contrastive_time_and_memory.py."""
    options = {name: value for name, value in asdict(o).items() if name != "out"}
    common = stamp(o.device, "contrastive_time_and_memory.py") | {"part": part} | options
    append(o.out, [common | row for row in rows])
