"""Measure step time and memory of FLM, MLM, AR and PrefixLM, compared with their FLOPs and with FLM's released layout.

    python bench/objective_step_time.py --size small --vocab 8000
    python bench/objective_step_time.py --size base --batch 64 --vocab 50265 --device cuda      # the published size

All arms share one model and take turns, step by step, on the same random batches. A ratio is the median of the ratios of
neighbouring steps, so that other work on the machine affects all arms alike. The first command takes about five minutes on
one core. Rows are appended to bench/results/objective_step_time.jsonl.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from flm_released_layout import PlainFLM, padded
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.sizes import flm_base, small, tiny, with_tokenizer
from fastvlp.objectives.ar import ARConfig
from fastvlp.objectives.flm import FLMConfig, official_flm
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.objective import combine
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.training.flops import gradient_flops
from fastvlp.training.hardware import adamw_bytes, peak_flops, peak_memory
from fastvlp.training.pretraining import Pretraining

OBJECTIVES = {"flm": FLMConfig(), "mlm": MLMConfig(), "ar": ARConfig(), "prefixlm": PrefixLMConfig()}
PLAIN = {"flm_plain": "written_out", "flm_plain_fused_attention": "fused"}
OUT = RESULTS / "objective_step_time.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "small", "base"] = "small"
    """Size of the model; `base` is the published one."""
    image: int | None = None
    """Side of the images in pixels, instead of the size's own."""
    layers: int | None = None
    """Layers of the text encoder and of fusion, instead of the size's own; the image encoder has twice as many."""
    vocab: int = 8000
    """Tokens in the vocabulary."""
    batch: int = 32
    """Pairs in a step."""
    repetitions: int = 10
    """Timed steps of each arm."""
    arms: tuple[str, ...] = (*OBJECTIVES, *PLAIN)
    """Arms to measure. `flm_plain` is FLM in the released layout, in the second variant with fused attention."""
    plain_length: int = 50
    """Tokens that the released layout pads every text to."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: under autocast, with weights in fp32."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of weights and batches."""
    memory: bool = True
    """Measure peak memory too, each arm in a process of its own."""
    check: bool = True
    """Compare the released layout's losses with this library's before anything is timed."""
    out: Path = OUT
    """File that rows are appended to."""


def model_config(o: Options) -> ModelConfig:
    make = {"tiny": tiny, "small": small, "base": flm_base}[o.size]
    config = make() if o.image is None else make(size=o.image)
    special = SimpleNamespace(vocab_size=o.vocab, pad=1, bos=0, eos=2, mask=3)
    config = with_tokenizer(config, special)
    if o.layers is None:
        return config
    assert config.reconstructor is not None
    return replace(
        config,
        image=replace(config.image, depth=2 * o.layers),
        text=replace(config.text, depth=o.layers),
        fusion=replace(config.fusion, depth=o.layers),
        reconstructor=replace(config.reconstructor, bottom=o.layers, top=o.layers),
    )


def random_batch(o: Options, config: ModelConfig, number: int) -> Batch:
    """Random images, and captions of 5 to 25 tokens, 13 on average, as in COCO; as wide as the batch's longest."""
    random = torch.Generator().manual_seed(o.seed * 1000 + number)
    length = (2 + torch.poisson(torch.full((o.batch,), 11.0), generator=random).long()).clamp(5, 25)
    L = int(length.max())
    ids = torch.randint(4, o.vocab, (o.batch, L), generator=random)
    ids[:, 0] = 0
    ids[torch.arange(o.batch), length - 1] = 2
    ids[torch.arange(L) >= length[:, None]] = 1
    side = config.image.size
    image = torch.randint(0, 256, (o.batch, 3, side, side), dtype=torch.uint8, generator=random)
    seed = torch.randint(0, 1 << 60, (o.batch,), generator=random)
    return Batch(image=image, ids=ids, length=length, seed=seed).to(o.device)


@dataclass(frozen=True)
class Arm:
    """Functions of a batch: the loss, and the FLOPs of a training step."""

    loss: Callable[[Batch], Tensor]
    flops: Callable[[Batch], float]


def build_arm(name: str, o: Options, model: VLModel) -> Arm:
    config = model.config
    if name in PLAIN:
        plain = PlainFLM(model, PLAIN[name])

        def loss(batch: Batch) -> Tensor:
            parts = plain.losses(padded(batch, o.plain_length, config.text.pad)).values()
            return sum(parts, start=torch.zeros((), device=o.device)) / 3

        return Arm(loss, counted(model, loss))
    if name not in OBJECTIVES:
        raise SystemExit(f"no arm {name!r}; there are {', '.join((*OBJECTIVES, *PLAIN))}")
    # All that objectives read of a tokenizer.
    words = SimpleNamespace(starts_word=torch.ones(o.vocab, dtype=torch.bool))
    pretraining = Pretraining(model, {name: OBJECTIVES[name].build(config, words)}).to(o.device)

    def loss(batch: Batch) -> Tensor:
        return combine(pretraining(batch))

    return Arm(loss, counted(pretraining, loss))


def counted(module: nn.Module, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], float]:
    """A function that returns the FLOPs of a step, and counts each shape of batches once."""
    known: dict[torch.Size, float] = {}

    def flops(batch: Batch) -> float:
        if batch.ids.shape not in known:
            known[batch.ids.shape] = gradient_flops(module, lambda: loss(batch))
        return known[batch.ids.shape]

    return flops


def check(o: Options) -> float:
    """The largest relative difference between the losses in the released layout and this library's, on the same weights.

    This library gets one column more than the longest text, since the released reverse loss has a target on the first
    padding. Raises SystemExit where the losses differ."""
    torch.manual_seed(o.seed)
    model = VLModel(model_config(o)).to(o.device).eval()
    batch = random_batch(o, model.config, 0)
    ours = padded(batch, batch.ids.shape[1] + 1, model.config.text.pad)
    objective = official_flm().build(model.config, SimpleNamespace())
    with torch.no_grad():
        expected = PlainFLM(model).losses(padded(batch, o.plain_length, model.config.text.pad))
        losses = objective(model, model.encode_image(ours.image), ours)
    difference = max(abs((losses[name].total / losses[name].count / expected[name]).item() - 1) for name in expected)
    if difference > 1e-4:
        raise SystemExit(f"the released layout's losses differ by {difference:.1e} from ours: times are not comparable")
    return difference


class Clock:
    """Measures CPU seconds and wall seconds since it was created; a GPU finishes its work first."""

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        cpu, wall = self._now()
        return {"cpu_s": cpu - self.start[0], "wall_s": wall - self.start[1]}


def step(o: Options, arm: Arm, optimiser: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """Runs one step; returns its seconds, and those of its forward and backward pass alone."""
    clock = Clock(o.device)
    device_type = torch.device(o.device).type
    with torch.autocast(device_type, torch.bfloat16) if o.precision == "bf16" else nullcontext():
        loss = arm.loss(batch)
    loss.backward()
    gradient = clock.read()
    # Parameters that this arm does not use have no gradient, and AdamW skips them.
    optimiser.step()
    optimiser.zero_grad()
    return clock.read() | {f"gradient_{name}": seconds for name, seconds in gradient.items()}


def prepared(o: Options, names: tuple[str, ...]) -> tuple[VLModel, torch.optim.Optimizer, dict[str, Arm]]:
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    model = VLModel(model_config(o)).to(o.device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return model, optimiser, {name: build_arm(name, o, model) for name in names}


def measure_memory(o: Options, name: str, results: multiprocessing.SimpleQueue) -> None:
    """Puts (peak bytes, trained parameters) of one arm. Runs in a process of its own, since a process cannot reset its peak."""
    model, optimiser, arms = prepared(o, (name,))
    for number in range(2):
        step(o, arms[name], optimiser, random_batch(o, model.config, number))
    results.put((peak_memory(o.device), sum(p.numel() for p in optimiser.state)))


def memory_of(o: Options, name: str) -> tuple[int, int]:
    """Peak bytes, and the number of parameters that the arm trains."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=measure_memory, args=(o, name, results))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{name}: the process that measures its memory failed")
    return results.get()


def time_arms(o: Options) -> dict[str, list[dict[str, float]]]:
    """Each arm's steps, taken in turn and in alternating order; the first two of each arm are a warm-up."""
    model, optimiser, arms = prepared(o, o.arms)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(-2 if o.repetitions > 1 else 0, o.repetitions):
        batch = random_batch(o, model.config, max(0, number))
        for name in list(arms)[:: 1 if number % 2 else -1]:
            seconds = step(o, arms[name], optimiser, batch)
            if number >= 0:
                steps[name].append(seconds | {"flops": arms[name].flops(batch)})
    return steps


def summary(o: Options, steps: dict[str, list[dict[str, float]]]) -> list[dict]:
    base = "mlm" if "mlm" in steps else next(iter(steps))
    key = "cpu_s" if torch.device(o.device).type == "cpu" else "wall_s"
    rows = []
    for name, own in steps.items():
        row: dict = {"arm": name}
        row |= {field: statistics.median(one[field] for one in own) for field in own[0]}
        row["base"], row["clock"] = base, key
        for field in (key, f"gradient_{key}", "flops"):
            ratios = [one[field] / other[field] for one, other in zip(own, steps[base])]
            row[f"{field}_ratio"] = statistics.median(ratios)
        peak = peak_flops(o.device, o.precision)
        row["flops_per_s"] = row["flops"] / row[key]
        row["mfu"] = row["flops_per_s"] / peak if peak else None
        if o.memory:
            row["memory_bytes"], row["parameters"] = memory_of(o, name)
            row["adamw_bytes"] = adamw_bytes(row["parameters"])
        rows.append(row)
    return rows


def show(o: Options, rows: list[dict]) -> None:
    key, base = rows[0]["clock"], rows[0]["base"]
    table = Table(title=f"{o.size}, batch {o.batch}, vocabulary {o.vocab}, {o.device}, {o.precision}")
    for title in ("arm", "step ms", f"time/{base}", f"FLOPs/{base}", "time/FLOPs", "GFLOP", "GFLOP/s", "peak MB"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for row in rows:
        times, floor = row[f"{key}_ratio"], row["flops_ratio"]
        table.add_row(
            row["arm"],
            f"{row[key] * 1e3:.1f}",
            f"{times:.2f}",
            f"{floor:.2f}",
            f"{times / floor:.2f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_per_s'] / 1e9:.0f}",
            f"{row['memory_bytes'] / 1e6:.0f}" if o.memory else "-",
        )
    console = Console()
    console.print(table)
    named = {row["arm"]: row for row in rows}
    for name in PLAIN:
        if "flm" in named and name in named:
            gain = named[name][f"{key}_ratio"] / named["flm"][f"{key}_ratio"]
            console.print(f"{name}: FLM is {gain:.2f} times as fast", highlight=False)


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    common = stamp(o.device, "objective_step_time.py") | ({"plain_difference": check(o)} if o.check else {})
    rows = summary(o, time_arms(o))
    show(o, rows)
    options = {name: value for name, value in asdict(o).items() if name not in ("arms", "out")}
    append(o.out, [common | options | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
