"""Measure padding and speed of batches of rows of similar length, compared with batches of rows in random order.

    python bench/batch_padding.py                                 # random lengths, distributed as UNITER's words and regions
    python bench/batch_padding.py --captions photos/train         # FLOPs that grouping saves each objective on captions
    python bench/batch_padding.py --captions photos/train --towers b32 --batch 1024      # and of CLIP's step, in random order

The first command fills the same budget of tokens with rows in random order, by UNITER's released sampler, and by this
library's; it counts the padding of an epoch, and times training steps of plain transformer blocks on such batches. The arms
take turns, and a ratio is the median of the ratios of neighbouring steps. It takes about ten minutes on one core. The second
only counts, in a minute. So does the third: the negatives of a contrastive loss should not have the length of the positive,
so that its texts are grouped within a batch alone, or packed without any padding. Rows are appended to
bench/results/batch_padding.jsonl.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from objective_step_time import OBJECTIVES, Clock, model_config
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp.batch import Batch
from fastvlp.data.batching import Grouping, Lengths
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData
from fastvlp.data.tokenize import Tokenizer
from fastvlp.model.layers import LayerConfig, stack
from fastvlp.model.model import VLModel
from fastvlp.model.sizes import clip_b16, clip_b32, clip_small, with_tokenizer
from fastvlp.objectives.objective import combine
from fastvlp.training.flops import gradient_flops
from fastvlp.training.pretraining import Pretraining

OUT = RESULTS / "batch_padding.jsonl"


@dataclass(frozen=True, kw_only=True)
class Options:
    rows: int = 200_000
    """Random rows."""
    max_tokens: int = 10_240
    """Budget of a batch."""
    group: int = Grouping().group
    """Rows among which rows of similar length are sought."""
    width: int = 256
    """Width of the blocks that are timed."""
    depth: int = 4
    """Blocks that are timed."""
    repetitions: int = 10
    """Timed steps of each arm."""
    captions: str | None = None
    """A split of image-text pairs: count the FLOPs of objectives on it, instead of timing."""
    field: str = "captions"
    """Field of its records that holds the captions."""
    size: Literal["tiny", "small", "base"] = "small"
    """Size of the model whose FLOPs are counted."""
    image: int | None = None
    """Side of its images in pixels, instead of the size's own."""
    layers: int | None = None
    """Its text and fusion layers, instead of the size's own."""
    towers: Literal["b32", "b16", "small"] | None = None
    """With `captions`: count CLIP's step of this size, on batches in random order, in place of steps that predict words."""
    rows_of_group: tuple[int, ...] = (64, 256)
    """With `towers`: texts of a batch that are encoded together, those of about the same length."""
    keep: tuple[float, ...] = (1.0, 0.5, 0.25)
    """With `towers`: shares of the patches that are encoded."""
    batch: int = 32
    """Rows of a batch on captions."""
    vocab: int = 5000
    """Tokens in its vocabulary."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to measure."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: under autocast."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of the random rows and their order."""
    out: Path = OUT
    """File that rows are appended to."""


def uniter_rows(o: Options) -> Lengths:
    """Lengths as in UNITER's data: regions N(36, 16) between 10 and 100, words N(11.5, 3.5) and two special tokens."""
    random = torch.Generator().manual_seed(o.seed)
    regions = (36 + 16 * torch.randn(o.rows, generator=random)).round().clamp(10, 100)
    words = (11.5 + 3.5 * torch.randn(o.rows, generator=random)).round().clamp(min=1)
    return Lengths((regions + words + 2).long().numpy(), np.arange(o.rows + 1))


def lengths_by_batch(o: Options, grouping: Grouping, lengths: Lengths) -> Iterator[Tensor]:
    """The lengths of the rows of each batch of the first epoch."""
    loader = Loader(o.rows, lambda rows: ..., batch_size=1, seed=o.seed, grouping=grouping, lengths=lambda: lengths)
    assert loader.plan is not None
    for s in range(int(loader.plan.epoch())):
        yield torch.from_numpy(lengths.tokens_T[[row.index for row in loader.rows(s)]])


def in_random_order(o: Options, lengths: Lengths) -> Iterator[Tensor]:
    """Batches of shuffled rows, filled eight at a time while rows times the longest stay within the budget."""
    order = torch.randperm(o.rows, generator=torch.Generator().manual_seed(o.seed))
    first = longest = 0
    length_N = torch.from_numpy(lengths.tokens_T)[order]
    for at, most in zip(range(0, o.rows, 8), (part.max() for part in length_N.split(8))):
        longest = max(longest, int(most))
        if (at + 8 - first) * longest > o.max_tokens:
            yield length_N[first:at]
            first, longest = at, int(most)
    yield length_N[first:]


def batches_of_arms(o: Options) -> dict[str, list[Tensor]]:
    """The lengths of the rows of each batch, by arm."""
    lengths = uniter_rows(o)
    released = Grouping(group=8192, max_tokens=o.max_tokens, reset_longest=False)
    ours = Grouping(group=o.group, max_tokens=o.max_tokens)
    return {
        "random": list(in_random_order(o, lengths)),
        "uniter_released": list(lengths_by_batch(o, released, lengths)),
        "grouped": list(lengths_by_batch(o, ours, lengths)),
    }


def padding(o: Options, batches: list[Tensor]) -> dict[str, float]:
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
    """Seconds per real token in the steps of each arm, which take turns; the first two steps are a warm-up."""
    torch.manual_seed(o.seed)
    blocks = stack(LayerConfig(width=o.width, heads=o.width // 64, hidden=4 * o.width), o.depth)
    assert isinstance(blocks, nn.ModuleList)
    blocks.to(o.device).train()
    optimiser = torch.optim.AdamW(blocks.parameters(), lr=1e-4, fused=True)
    key = "cpu_s" if torch.device(o.device).type == "cpu" else "wall_s"
    seconds_per_token: dict[str, list[float]] = {name: [] for name in arms}
    # Batches are shuffled within a group of rows only: take some from the whole epoch.
    chosen = {name: batches[:: max(1, len(batches) // (o.repetitions + 2))] for name, batches in arms.items()}
    for number in range(o.repetitions + 2):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            length = chosen[name][number % len(chosen[name])].to(o.device)
            seconds = step(o, blocks, optimiser, length)[key]
            if number >= 2:
                seconds_per_token[name].append(seconds / int(length.sum()))
    return seconds_per_token


def step(o: Options, blocks: nn.ModuleList, optimiser: torch.optim.Optimizer, length_B: Tensor) -> dict[str, float]:
    L = int(length_B.max())
    x_BLD = torch.randn(len(length_B), L, o.width, device=o.device)
    real_BL = torch.arange(L, device=o.device) < length_B[:, None]
    clock = Clock(o.device)
    device_type = torch.device(o.device).type
    with torch.autocast(device_type, torch.bfloat16) if o.precision == "bf16" else nullcontext():
        for block in blocks:
            x_BLD = block(x_BLD, mask=real_BL[:, None, None])
        loss = x_BLD[real_BL].float().square().mean()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return clock.read()


def budgets(o: Options) -> list[dict]:
    arms = batches_of_arms(o)
    seconds_per_token = time_arms(o, arms)
    rows: list[dict] = []
    for name, batches in arms.items():
        row: dict = {"arm": name, "base": "random"} | padding(o, batches)
        row["tokens_per_s"] = 1 / statistics.median(seconds_per_token[name])
        row["pairs_per_s"] = row["tokens_per_s"] / row["tokens_per_row"]
        pairs = zip(seconds_per_token[name], seconds_per_token["random"])
        row["speed_ratio"] = statistics.median(base / own for own, base in pairs)
        rows.append(row)
    show(
        f"{o.max_tokens} tokens a batch, width {o.width}, {o.device}, {o.precision}",
        rows,
        {"rows_per_batch": ".1f", "fill": ".1%", "padding": ".2%", "tokens_per_s": ",.0f", "pairs_per_s": ",.1f"}
        | {"speed_ratio": ".2f"},
    )
    return rows


def captions(o: Options) -> list[dict]:
    """FLOPs per row of each objective's training step, on batches of a fixed number of rows."""
    assert o.captions is not None
    data = PairData(train=o.captions, batch_size=o.batch, captions=o.field, group=o.group)
    tokenizer = Tokenizer.train(data.texts(), vocab_size=o.vocab)
    config = model_config(o)
    data_rows = data.rows("train", tokenizer, config.image.size, strict=False)
    assert data_rows is not None and data_rows.lengths is not None
    lengths = data_rows.lengths()
    model = VLModel(config)
    # All that objectives read of a tokenizer.
    words = SimpleNamespace(starts_word=torch.ones(o.vocab, dtype=torch.bool))
    trainings = {name: Pretraining(model, {name: part.build(config, words)}) for name, part in OBJECTIVES.items()}
    rows, steps = [], data_rows.count // o.batch
    counted: dict[tuple[str, int, int], int] = {}
    for arm, grouping in (("random", None), ("grouped", data.grouping)):
        loader = Loader(
            data_rows.count, data_rows.make, batch_size=o.batch, seed=o.seed, grouping=grouping, lengths=lambda: lengths
        )
        flops, real, padded = dict.fromkeys(trainings, 0.0), 0, 0
        for s in range(steps):
            batch = batch_of_one_word(loader, lengths, s, config.image.size)
            real, padded = real + int(batch.length.sum()), padded + batch.ids.numel()
            for name, training in trainings.items():
                shape = (name, *batch.ids.shape)
                if shape not in counted:
                    counted[shape] = gradient_flops(training, lambda of=training, batch=batch: combine(of(batch)))
                flops[name] += counted[shape]
        row = {"arm": arm, "padding": 1 - real / padded, "tokens_per_row": real / steps / o.batch}
        row |= {f"{name}_gflops_per_row": n / 1e9 / steps / o.batch for name, n in flops.items()}
        rows.append(row | {f"{name}_over_ar": flops[name] / flops["ar"] for name in trainings if name != "ar"})
    columns = {"padding": ".2%"} | {f"{name}_gflops_per_row": ".3f" for name in ("flm", "mlm", "ar")}
    show(f"{o.captions}, {o.size}, batch {o.batch}", rows, columns | {"flm_over_ar": ".3f"})
    return rows


def towers(o: Options) -> list[dict]:
    """Which share of the FLOPs of CLIP's step is saved where texts are encoded in groups of about the same length, and where
    they are packed without padding; each beside texts that are as long as the longest of the batch."""
    assert o.captions is not None
    data = PairData(train=o.captions, batch_size=o.batch, captions=o.field)
    tokenizer = Tokenizer.train(data.texts(), vocab_size=o.vocab)
    text_L, image = tower_flops(o, data.max_length)
    data_rows = data.rows("train", tokenizer, 16, strict=False)
    assert data_rows is not None and data_rows.lengths is not None
    lengths = data_rows.lengths()
    loader = Loader(data_rows.count, data_rows.make, batch_size=o.batch, seed=o.seed)
    flops: dict[str, float] = {}
    tokens, steps = {"padded": 0, "packed": 0}, max(1, data_rows.count // o.batch)
    for s in range(steps):
        index, seed = (torch.tensor(column) for column in zip(*loader.rows(s)))
        length = lengths(index, seed).sort().values
        arms = {
            "padded": [length],
            **{f"groups of {n}": length.split(n) for n in o.rows_of_group},
            "packed": length.split(1),
        }
        for name, parts in arms.items():
            flops[name] = flops.get(name, 0) + sum(len(part) * text_L[int(part[-1])] for part in parts)
        tokens["padded"] += o.batch * int(length[-1])
        tokens["packed"] += int(length.sum())
    row = {"padding": 1 - tokens["packed"] / tokens["padded"], "tokens_per_row": tokens["packed"] / steps / o.batch}
    rows = [
        row
        | {"arm": f"{name}, keep {keep}", "text_gflops_per_row": flops[name] / 1e9 / steps / o.batch}
        | {"image_gflops_per_row": flops_of_image / 1e9}
        | {"saved": (flops["padded"] - flops[name]) / (flops["padded"] + flops_of_image * steps * o.batch)}
        for keep, flops_of_image in image.items()
        for name in flops
    ]
    columns = {"padding": ".1%", "text_gflops_per_row": ".3f", "image_gflops_per_row": ".2f", "saved": ".1%"}
    show(f"{o.captions}, CLIP {o.towers}, batch {o.batch}", rows, columns)
    return rows


def tower_flops(o: Options, longest: int) -> tuple[dict[int, int], dict[float, int]]:
    """FLOPs, forward and backward, of a text of each length, and of an image at each share of its patches, which nobody
    computes."""
    make = {"b32": clip_b32, "b16": clip_b16, "small": clip_small}[o.towers or "b32"]
    with FakeTensorMode():
        model = VLModel(with_tokenizer(make(), SimpleNamespace(vocab_size=o.vocab, pad=1, bos=0, eos=2, mask=3)))
        seed, size = torch.zeros(1, dtype=torch.int64), model.config.image.size

        def text(L: int) -> Tensor:
            return model.embed_text(torch.zeros(1, L, dtype=torch.int64), torch.full((1,), L)).sum()

        def image(keep: float) -> Tensor:
            pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
            kept = model.config.image.random_patches(seed, keep, pixels)
            return model.embed_image(model.encode_image(pixels, kept)).sum()

        # Products grow with the length, and attention with its square.
        some = (2, 8, 32)
        through = np.polyfit(some, [gradient_flops(model, lambda L=L: text(L)) for L in some], 2)
        texts = {L: round(np.polyval(through, L)) for L in range(2, longest + 1)}
        return texts, {keep: gradient_flops(model, lambda keep=keep: image(keep)) for keep in o.keep}


def batch_of_one_word(loader: Loader, lengths: Lengths, s: int, side: int) -> Batch:
    """Batch s of the loader, with one word everywhere and black images: what a step costs depends on lengths and seeds."""
    rows = loader.rows(s)
    seed = torch.tensor([row.seed for row in rows])
    length = lengths(torch.tensor([row.index for row in rows]), seed)
    ids = torch.full((len(rows), int(length.max())), 4)
    return Batch(image=torch.zeros(len(rows), 3, side, side, dtype=torch.uint8), ids=ids, length=length, seed=seed)


def show(title: str, rows: list[dict], numbers: dict[str, str]) -> None:
    table = Table(title=title)
    table.add_column("arm")
    for name in numbers:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row["arm"], *(format(row[name], spec) for name, spec in numbers.items()))
    Console().print(table)


def main(o: Options) -> None:
    torch.set_num_threads(o.threads)
    if o.towers is not None and o.captions is None:
        raise SystemExit("--towers counts padding of captions: name their split, such as --captions photos/train")
    counted = towers if o.towers is not None else captions
    rows = counted(o) if o.captions is not None else budgets(o)
    common = stamp(o.device, "batch_padding.py") | {name: value for name, value in asdict(o).items() if name != "out"}
    append(o.out, [common | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
