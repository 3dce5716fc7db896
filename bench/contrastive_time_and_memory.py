"""Measure contrastive training: what masking gains, what the losses keep, the largest batch, a step beside open_clip's.

    python bench/contrastive_time_and_memory.py masking --size small --batch 128
    python bench/contrastive_time_and_memory.py loss --most 16384
    python bench/contrastive_time_and_memory.py largest --memory-gb 1
    python bench/contrastive_time_and_memory.py open-clip --size small        # needs open_clip and torchvision

The arms of a comparison take turns, step by step, on the same batches; a ratio is the median of the ratios of neighbouring
steps. Seconds are CPU time of the process, or of CUDA events on a GPU. Bytes on a CPU are counted from the operations that
would run (`fastvlp.speed.memory`), so that they are the same on every machine; on a GPU they are the allocator's. Each command
takes 1 to 20 minutes on one core. Rows are appended to bench/results/contrastive_time_and_memory.jsonl.

On one core of an AMD EPYC (commit cbc6530, bf16): half and a quarter of the patches gain 100 to 110 % of what the counted
FLOPs allow. The softmax loss of 65,536 pairs of width 256 keeps 34.6 GB with whole logits and 0.27 GB in tiles (of 16,384
pairs: 2.2 and 0.07 GB, in 0.75 of the time). A step of `small` in 1 GB takes 224 pairs, and 9,472 with cached gradients. No
GPU was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from interleaved_steps import (
    Laps,
    Options,
    Row,
    build_training,
    in_turn,
    medians,
    random_batch,
    ratio,
    save,
    show,
    step,
    with_vocabulary_and_layers,
)
from open_clip_step_time import OpenCLIPStep, open_clip_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp.batch import Batch
from fastvlp.model import sizes
from fastvlp.model.joint_space import unit as normalised
from fastvlp.objectives.contrastive import info_nce, sigmoid_loss
from fastvlp.objectives.objective import combine
from fastvlp.speed.memory import CountedBytes, largest_rows
from fastvlp.training.flops import gradient_flops
from fastvlp.training.gradient_cache import cache_gradients
from fastvlp.training.hardware import peak_flops
from fastvlp.training.pretraining import Pretraining

SIZES = {
    "tiny": sizes.flip_tiny_published,
    "small": sizes.flip_small_published,
    "b16": sizes.flip_b16_published,
    "l16": sizes.flip_l16_published,
}
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Towers(Options):
    size: Literal["tiny", "small", "b16", "l16"] = "small"
    """Size of FLIP's towers, as released."""
    layers: int | None = None
    """Layers of each tower, instead of all."""
    vocab: int = 8000
    """Tokens in the vocabulary."""
    keep: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Shares of the patches."""


@dataclass(frozen=True, kw_only=True)
class Masking(Towers):
    """Time whole training steps of one batch size at each share of the patches, and compare with the counted FLOPs."""

    batch: int = 128
    """Pairs in a step."""
    repetitions: int = 10
    """Timed steps of each arm."""


@dataclass(frozen=True, kw_only=True)
class Losses(Options):
    """Time the softmax and the sigmoid loss, forward and backward, on unit vectors, with whole logits and in tiles, and count
    their bytes. Batch sizes double from `least` on."""

    least: int = 1024
    """Pairs in the smallest batch."""
    most: int = 4096
    """Pairs in the largest batch that is timed."""
    counted: int = 65536
    """Pairs in the largest batch whose bytes are counted."""
    memory_gb: float = 12.0
    """Do not time what would take more memory than this."""
    width: int = 256
    """Width of the joint space."""
    repetitions: int = 32
    """Timed repetitions at the smallest batch; a quarter as many at each doubling."""


@dataclass(frozen=True, kw_only=True)
class Largest(Towers):
    """Find the largest batch whose training step fits into a given memory, without and with gradient caching."""

    memory_gb: float = 1.0
    """Memory, weights and optimiser state included."""
    micro: int = 64
    """Pairs in a micro-batch of the arm with cached gradients."""


# --- masking ---------------------------------------------------------------------------------------------------------


def masking(o: Masking) -> list[Row]:
    config = with_vocabulary_and_layers(SIZES[o.size](), o.vocab, o.layers)
    training, optimiser = build_training(o, config)
    counted: dict[tuple[str, int], int] = {}

    def run(number: int, name: str) -> Row:
        training.keep = float(name)
        batch = random_batch(o, config, o.batch, number)
        shape = (name, batch.ids.shape[1])
        if shape not in counted:
            counted[shape] = gradient_flops(training, lambda: combine(training(batch)))
        return step(o, lambda: combine(training(batch)), optimiser) | {"flops": counted[shape]}

    results = in_turn([str(keep) for keep in o.keep], o.repetitions, run)
    whole, peak, rows = results[str(o.keep[0])], peak_flops(o.device, o.precision), []
    for name, steps in results.items():
        row = {"arm": f"keep {name}"} | medians(steps)
        row |= {f"{field}_gain": ratio(whole, steps, field) for field in ("step_s", "gradient_s", "flops")}
        row |= {"achieved": row["step_s_gain"] / row["flops_gain"], "pairs_per_s": o.batch / row["step_s"]}
        row |= {"flops_per_s": row["flops"] / row["step_s"]}
        rows.append(row | {"mfu": row["flops_per_s"] / peak if peak else None})
    columns = {"step s": ("step_s", ".3f"), "gain": ("step_s_gain", ".2f"), "ceiling": ("flops_gain", ".2f")}
    columns |= {"achieved": ("achieved", ".0%"), "less optimiser": ("gradient_s_gain", ".2f")}
    show(f"masking, {o.size}, batch {o.batch}", rows, columns | {"FLOP/s": ("flops_per_s", ".2g")})
    return rows


# --- losses ------------------------------------------------------------------------------------------------


def build_losses(o: Losses, B: int, device: str) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """The inputs, and for each arm a function that computes its loss from them."""
    random = torch.Generator().manual_seed(o.seed)
    image, text = (normalised(torch.randn(B, o.width, generator=random)).to(device).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    own = torch.arange(B, device=device)

    def softmax(whole: int | None) -> Tensor:
        both = [info_nce(*two, own, scale, whole_logits=whole) for two in ((image, text), (text, image))]
        return torch.cat(both).mean()

    def sigmoid(whole: int | None) -> Tensor:
        return sigmoid_loss(image, text, own, scale, bias, whole_logits=whole).mean()

    losses = {
        "softmax whole": lambda: softmax(B * B),
        "softmax tiles": lambda: softmax(None),
        "sigmoid whole": lambda: sigmoid(B * B),
        "sigmoid tiles": lambda: sigmoid(None),
    }
    return [image, text, scale, bias], losses


def count_bytes(o: Losses, B: int) -> dict[str, Row]:
    """Bytes that each loss keeps from its forward to its backward pass, and its peak, gradients included, inputs not."""
    rows = {}
    with FakeTensorMode():
        inputs, losses = build_losses(o, B, "cpu")
        for name, loss in losses.items():
            with CountedBytes() as memory:
                total = loss()
                kept = memory.now
                total.backward()
            rows[name] = {"kept_bytes": kept, "peak_bytes": memory.peak}
            clear(inputs)
    return rows


def clear(inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        x.grad = None


def time_losses(o: Losses, B: int, names: Sequence[str]) -> dict[str, list[Row]]:
    inputs, losses = build_losses(o, B, o.device)

    def run(_: int, name: str) -> Row:
        if o.cuda:
            torch.cuda.reset_peak_memory_stats(o.device)
        before = torch.cuda.memory_allocated(o.device) if o.cuda else 0
        lap = Laps(o.cuda)
        losses[name]().backward()
        lap()
        peak = {"device_peak_bytes": torch.cuda.max_memory_allocated(o.device) - before} if o.cuda else {}
        clear(inputs)
        return {"loss_s": lap.seconds()[0]} | peak

    return in_turn(names, max(1, round(o.repetitions * (o.least / B) ** 2)), run)


def time_and_count_losses(o: Losses) -> list[Row]:
    rows, B = [], o.least
    while max(o.most, o.counted) >= B:
        counted = count_bytes(o, B)
        fit = [name for name, row in counted.items() if o.most >= B and row["peak_bytes"] <= o.memory_gb * GIGA]
        timed = time_losses(o, B, fit)
        for name, row in counted.items():
            steps, whole = timed.get(name), timed.get(f"{name.split()[0]} whole")
            row = {"arm": name, "rows": B} | row | (medians(steps) if steps else {"loss_s": None})
            rows.append(row | {"time_ratio": ratio(steps, whole, "loss_s") if steps and whole else None})
        B *= 2
    columns = {"pairs": ("rows", ",d"), "seconds": ("loss_s", ".3f"), "time to whole": ("time_ratio", ".2f")}
    columns |= {"bytes kept": ("kept_bytes", ".2e"), "peak": ("peak_bytes", ".2e")}
    show(f"losses alone, width {o.width}", rows, columns)
    return rows


# --- the largest batch -----------------------------------------------------------------------------------------------


def whole_step(o: Largest, training: Pretraining, optimiser: torch.optim.Optimizer, micro: Sequence[Batch]) -> None:
    """Runs one training step as the loop does: with cached gradients where there are several micro-batches."""
    counts = {name: count * len(micro) for name, count in training.counts(micro[0]).items()}
    cached = cache_gradients(training, micro, counts, lambda i: o.autocast()) if len(micro) > 1 else None
    # Where bytes are only counted, two micro-batches are enough: later ones hold no more.
    for i, batch in enumerate(micro if o.cuda else micro[:2]):
        with o.autocast():
            losses = training(batch, cached.grads[i] if cached is not None else None)
        combine(losses, counts).backward()
    optimiser.step()
    optimiser.zero_grad()


@contextmanager
def peaks(o: Largest) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the peak of bytes since its last call: the allocator's on a GPU; counted on a CPU, where
    nothing is computed."""
    if o.cuda:

        def peak() -> int:
            most = torch.cuda.max_memory_allocated(o.device)
            torch.cuda.reset_peak_memory_stats(o.device)
            return most

        yield peak
        return
    with FakeTensorMode(), CountedBytes() as memory:

        def counted() -> int:
            most, memory.peak = memory.peak, memory.now
            return most

        yield counted


def largest_batch(o: Largest, keep: float, micro: int | None) -> int:
    """The largest batch, made of micro-batches of `micro` rows, or one batch without caching where it is None."""
    with peaks(o) as peak:
        training, optimiser = build_training(o, with_vocabulary_and_layers(SIZES[o.size](), o.vocab, o.layers))
        training.keep = keep

        def memory_of(B: int) -> float:
            rows = micro or B
            try:
                batches = [random_batch(o, training.model.config, rows, length=25) for _ in range(B // rows)]
                whole_step(o, training, optimiser, batches)
            except torch.OutOfMemoryError:
                optimiser.zero_grad()
                return math.inf
            return peak()

        return largest_rows(memory_of, o.memory_gb * GIGA, micro or 8)


def largest(o: Largest) -> list[Row]:
    rows = [
        {"arm": f"{arm}, keep {keep}", "largest": largest_batch(o, keep, micro)}
        for keep in o.keep
        for arm, micro in (("one batch", None), ("cached gradients", o.micro))
    ]
    show(f"largest batch in {o.memory_gb:g} GB, {o.size}", rows, {"pairs": ("largest", ",d")})
    return rows


# --- all -------------------------------------------------------------------------------------------------------------


def main(part: str, o: Options) -> None:
    torch.set_num_threads(o.threads)
    torch.manual_seed(o.seed)
    save(o, part, PARTS[part][1](o))


PARTS: dict[str, tuple[type, Any]] = {
    "masking": (Masking, masking),
    "loss": (Losses, time_and_count_losses),
    "largest": (Largest, largest),
    "open-clip": (OpenCLIPStep, open_clip_step),
}

if __name__ == "__main__":
    classes = {part: options for part, (options, _) in PARTS.items()}
    chosen = tyro.extras.subcommand_cli_from_dict(classes, description=__doc__)
    main(next(part for part, options in classes.items() if isinstance(chosen, options)), chosen)
