"""Padding and speed of batches of rows of one length, beside batches of rows as they come.

    python bench/batch_padding.py                                 # UNITER's rows, made: words and regions
    python bench/batch_padding.py --captions photos/train         # what grouping saves each objective on captions

The first fills the same budget of tokens with rows in random order, with UNITER's released sampler and with ours, counts
an epoch, and times training steps of plain transformer blocks on such batches: the arms take turns, and a ratio is the
median of the ratios of neighbouring steps. The second only counts, with train/speed.py. Results are appended to
bench/results/batch_padding.jsonl.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from objective_step_time import OBJECTIVES, Clock, made_config
from records import stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastvlp.batch import Batch
from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.layers import LayerConfig, stack
from fastvlp.model.model import VLModel
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.speed import step_flops

RESULTS = Path(__file__).parent / "results" / "batch_padding.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options:
    """rows: of the made data. width, depth: of the blocks that are timed. repetitions: timed steps of each arm.
    captions: a split to count on instead, with models of `size` and batches of `batch` rows."""

    rows: int = 200_000
    max_tokens: int = 10_240
    group: int = Grouping().group
    width: int = 256
    depth: int = 4
    repetitions: int = 10
    captions: str | None = None
    field: str = "captions"
    size: Literal["tiny", "small", "base"] = "small"
    image: int | None = None
    layers: int | None = None
    batch: int = 32
    vocab: int = 5000
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int = 1
    seed: int = 0
    out: Path = RESULTS


def uniter_rows(o: Options) -> Lengths:
    """Regions N(36, 16) between 10 and 100, words N(11.5, 3.5) and their two specials."""
    random = torch.Generator().manual_seed(o.seed)
    regions = (36 + 16 * torch.randn(o.rows, generator=random)).round().clamp(10, 100)
    words = (11.5 + 3.5 * torch.randn(o.rows, generator=random)).round().clamp(min=1)
    return Lengths((regions + words + 2).long(), torch.arange(o.rows + 1))


def lengths_by_batch(o: Options, grouping: Grouping, told: Lengths) -> Iterator[Tensor]:
    """Lengths of the rows of each batch of the first epoch."""
    loader = Loader(o.rows, lambda rows: ..., batch_size=1, seed=o.seed, grouping=grouping, lengths=lambda: told)
    assert loader.plan is not None
    for s in range(int(loader.plan.epoch())):
        yield told.tokens_T[torch.tensor([row.index for row in loader.rows(s)])]


def as_they_come(o: Options, told: Lengths) -> Iterator[Tensor]:
    """Shuffled rows, eight at a time, while rows times longest stay within the budget."""
    order = torch.randperm(o.rows, generator=torch.Generator().manual_seed(o.seed))
    first = longest = 0
    length_N = told.tokens_T[order]
    for at, most in zip(range(0, o.rows, 8), (part.max() for part in length_N.split(8))):
        longest = max(longest, int(most))
        if (at + 8 - first) * longest > o.max_tokens:
            yield length_N[first:at]
            first, longest = at, int(most)
    yield length_N[first:]


def made_arms(o: Options) -> dict[str, list[Tensor]]:
    told = uniter_rows(o)
    released = Grouping(group=8192, max_tokens=o.max_tokens, reset_longest=False)
    ours = Grouping(group=o.group, max_tokens=o.max_tokens)
    return {
        "random": list(as_they_come(o, told)),
        "uniter_released": list(lengths_by_batch(o, released, told)),
        "grouped": list(lengths_by_batch(o, ours, told)),
    }


def counted(o: Options, batches: list[Tensor]) -> dict[str, float]:
    real = sum(int(batch.sum()) for batch in batches)
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    return {
        "batches": len(batches),
        "rows_per_batch": o.rows / len(batches),
        "padding": 1 - real / padded,
        "fill": real / len(batches) / o.max_tokens,
        "tokens_per_row": real / o.rows,
    }


def time_arms(o: Options, arms: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """Seconds a real token of steps of each arm, taking turns; the first two are not counted."""
    torch.manual_seed(o.seed)
    blocks = stack(LayerConfig(width=o.width, heads=o.width // 64, hidden=4 * o.width), o.depth)
    assert isinstance(blocks, nn.ModuleList)
    blocks.to(o.device).train()
    optimiser = torch.optim.AdamW(blocks.parameters(), lr=1e-4, fused=True)
    key = "cpu_s" if torch.device(o.device).type == "cpu" else "wall_s"
    taken: dict[str, list[float]] = {name: [] for name in arms}
    # An epoch's batches are shuffled over a bucket alone: those of the bench come from all of it.
    chosen = {name: batches[:: max(1, len(batches) // (o.repetitions + 2))] for name, batches in arms.items()}
    for number in range(o.repetitions + 2):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            length = chosen[name][number % len(chosen[name])].to(o.device)
            seconds = step(o, blocks, optimiser, length)[key]
            if number >= 2:
                taken[name].append(seconds / int(length.sum()))
    return taken


def step(o: Options, blocks: nn.ModuleList, optimiser: torch.optim.Optimizer, length_B: Tensor) -> dict[str, float]:
    L = int(length_B.max())
    x_BLD = torch.randn(len(length_B), L, o.width, device=o.device)
    real_BL = torch.arange(L, device=o.device) < length_B[:, None]
    clock = Clock(o.device)
    kind = torch.device(o.device).type
    with torch.autocast(kind, torch.bfloat16) if o.precision == "bf16" else nullcontext():
        for block in blocks:
            x_BLD = block(x_BLD, mask=real_BL[:, None, None])
        loss = x_BLD[real_BL].float().square().mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return clock.read()


def budgets(o: Options) -> list[dict]:
    arms = made_arms(o)
    taken = time_arms(o, arms)
    rows: list[dict] = []
    for name, batches in arms.items():
        row: dict = {"arm": name, "base": "random"} | counted(o, batches)
        row["tokens_per_s"] = 1 / statistics.median(taken[name])
        row["pairs_per_s"] = row["tokens_per_s"] / row["tokens_per_row"]
        row["speed_ratio"] = statistics.median(base / own for own, base in zip(taken[name], taken["random"]))
        rows.append(row)
    show(
        f"{o.max_tokens} tokens a batch, width {o.width}, {o.device}, {o.precision}",
        rows,
        {"rows_per_batch": ".1f", "fill": ".1%", "padding": ".2%", "tokens_per_s": ",.0f", "pairs_per_s": ",.1f"}
        | {"speed_ratio": ".2f"},
    )
    return rows


def captions(o: Options) -> list[dict]:
    """FLOPs a row of each objective's step, on batches of a fixed number of rows."""
    assert o.captions is not None
    data = PairData(train=o.captions, batch_size=o.batch, captions=o.field, group=o.group)
    tokenizer = Tokenizer.train(data.texts(), vocab_size=o.vocab)
    config = made_config(o)
    found = data.rows("train", tokenizer, config.image.size, strict=False)
    assert found is not None and found.lengths is not None
    told = found.lengths()
    model = VLModel(config)
    words = SimpleNamespace(starts_word=torch.ones(o.vocab, dtype=torch.bool))
    parts = {name: Pretraining(model, {name: made.build(config, words)}) for name, made in OBJECTIVES.items()}
    rows = []
    for arm, grouping in (("random", None), ("grouped", data.grouping)):
        loader = Loader(
            found.count, found.make, batch_size=o.batch, seed=o.seed, grouping=grouping, lengths=lambda: told
        )
        flops, real, padded = dict.fromkeys(parts, 0.0), 0, 0
        for s in range(found.count // o.batch):
            batch = worded(loader, told, s)
            real, padded = real + int(batch.length.sum()), padded + batch.ids.numel()
            for name, part in parts.items():
                targets = {term: count.item() for term, count in part.counts(batch).items()}
                flops[name] += step_flops(part, [(len(batch), batch.ids.shape[1])], targets).training
        row = {"arm": arm, "padding": 1 - real / padded, "tokens_per_row": real / (s + 1) / o.batch}
        row |= {f"{name}_gflops_per_row": n / 1e9 / (s + 1) / o.batch for name, n in flops.items()}
        rows.append(row | {f"{name}_over_ar": flops[name] / flops["ar"] for name in parts if name != "ar"})
    columns = {"padding": ".2%"} | {f"{name}_gflops_per_row": ".3f" for name in ("flm", "mlm", "ar")}
    show(f"{o.captions}, {o.size}, batch {o.batch}", rows, columns | {"flm_over_ar": ".3f"})
    return rows


def worded(loader: Loader, told: Lengths, s: int) -> Batch:
    """Batch s with made words and no pictures: what its losses ask for depends on lengths and seeds."""
    rows = loader.rows(s)
    seed = torch.tensor([row.seed for row in rows])
    length = told(torch.tensor([row.index for row in rows]), seed)
    ids = torch.full((len(rows), int(length.max())), 4)
    return Batch(image=torch.empty(len(rows), 0), ids=ids, length=length, seed=seed)


def show(title: str, rows: list[dict], numbers: dict[str, str]) -> None:
    table = Table(title=title)
    table.add_column("arm")
    for name in numbers:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row["arm"], *(format(row[name], told) for name, told in numbers.items()))
    Console().print(table)


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    rows = captions(o) if o.captions is not None else budgets(o)
    common = stamp(o.device, "batch_padding.py") | {name: value for name, value in asdict(o).items() if name != "out"}
    o.out.parent.mkdir(parents=True, exist_ok=True)
    with o.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(common | row) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
