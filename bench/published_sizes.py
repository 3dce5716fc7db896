"""Train two steps of the published runs in their full size, from public encoders with random weights.

    python bench/published_sizes.py

Each run begins as its users begin it: CLIP ViT-B/32 and RoBERTa-base (flm_base), EfficientNet-B5 and a Chinese RoBERTa
(brivl_base, brivl2_base), BERT-base converted for one stream (uniter_base). Only the data, the batch of 2 pairs and the
precision (fp32) are not the recipe's; UNITER runs its four objectives in each step. A row says how many parameters there are
and are trained, how many of the trained tensors the steps changed, the losses, CPU seconds, and the greatest memory of the
process. Nothing is saved; all files are in a temporary folder. Rows are appended to bench/results/published_sizes.jsonl. It
takes about 3 minutes on one core, 8 GB of memory and 3 GB of disk.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from public_layouts import write_layout
from records import RESULTS, append, stamp
from rich.console import Console
from rich.table import Table

from fastvlp.convert.checkpoints import convert
from fastvlp.data.records.detections import Detections, pack
from fastvlp.data.records.shards import Shards, ShardWriter
from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.recipes import recipe
from fastvlp.training.hardware import peak_memory
from fastvlp.training.loop import start, steps
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import part_sizes

OUT = RESULTS / "published_sizes.jsonl"
RunName = Literal["flm_base", "brivl_base", "brivl2_base", "uniter_base"]
# The public encoders that each run starts from; of uniter_base the one that is converted.
ENCODERS: dict[RunName, dict[str, str]] = {
    "flm_base": {"image": "clip-vit-base-patch32", "text": "roberta-base"},
    "brivl_base": {"image": "efficientnet-b5", "text": "chinese-roberta-wwm-ext"},
    "brivl2_base": {"image": "efficientnet-b5", "text": "chinese-roberta-wwm-ext"},
    "uniter_base": {"init": "bert-base-cased"},
}
STEPS, BATCH = 2, 2


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tuple[RunName, ...] = ("flm_base", "brivl_base", "brivl2_base", "uniter_base")
    """Runs to take steps of."""
    threads: int = 1
    """CPU threads."""
    out: Path = OUT
    """File that rows are appended to."""


def made_data(folder: Path) -> list[str]:
    """A few scenes, to which a detector's 12 regions with UNITER's features and classes are added. Returns their texts."""
    write_world(folder / "scenes", WorldConfig(size=96), train=STEPS * BATCH, val=1, test=1, pairs=0, singles=0)
    draw, texts = np.random.default_rng(0), []
    with ShardWriter(folder / "train") as writer:
        for record in Shards(folder / "scenes" / "train"):
            low = draw.uniform(0, 0.5, (12, 2))
            classes = draw.exponential(size=(12, 1601))
            regions = Detections(
                np.concatenate([low, low + 0.4], 1).astype(np.float32),
                draw.exponential(size=(12, 2048)).astype(np.float16),
                (classes / classes.sum(1, keepdims=True)).astype(np.float16),
            )
            confidences = sorted(draw.uniform(0.3, 1, 12).tolist(), reverse=True)
            info = {**record.info, "confidences": [confidences]}
            writer.write(replace(record, info=info, detected=(pack(regions),)))
            texts += [text for field in ("captions", "captions_zh") for text in record.info[field]]
    return texts


def run_of(name: RunName, folder: Path, threads: int) -> TrainConfig:
    """The recipe on the made data, from the encoders in the folder."""
    run = recipe(name)
    data = replace(
        run.data,
        train=str(folder / "train"),
        val=None,
        batch_size=BATCH,
        workers=0,
        group=None,
        max_tokens=None,
        fill=None,
    )
    return replace(
        run,
        **{field: str(folder / public) for field, public in ENCODERS[name].items()},
        data=data,
        optim=replace(run.optim, warmup=0.0),
        out=str(folder / "run"),
        steps=STEPS,
        accumulate=1,
        mix=None,
        precision="fp32",
        compile=False,
        device="cpu",
        threads=threads,
    )


def checksums(module: torch.nn.Module) -> list[int]:
    """One number for each trained tensor."""
    return [zlib.crc32(p.detach().contiguous().numpy()) for p in module.parameters() if p.requires_grad]


def measure(name: RunName, folder: Path, threads: int) -> dict[str, Any]:
    """Takes the steps, in a process of its own."""
    began = time.process_time()
    state = start(run_of(name, folder, threads))
    sizes = part_sizes(state.model, state.pretraining.objectives)
    before, started = checksums(state.pretraining), time.process_time() - began
    reports, seconds = [], []
    began = time.process_time()
    for report in steps(state):
        reports.append(report)
        seconds.append(time.process_time() - began)
        began = time.process_time()
    after = checksums(state.pretraining)
    return {
        "run": name,
        "parameters": sum(size.parameters for size in sizes.values()),
        "trained": sum(size.trained for size in sizes.values()),
        "parts": {part: size.parameters for part, size in sizes.items()},
        "tensors": len(before),
        "changed": sum(a != b for a, b in zip(before, after)),
        "losses": [report.losses for report in reports],
        "grad_norms": [report.grad_norm for report in reports],
        "skipped": sum(report.skipped for report in reports),
        "step_cpu_s": seconds,
        "start_cpu_s": started,
        "peak_bytes": peak_memory("cpu"),
    }


def prepared(name: RunName, folder: Path) -> None:
    """Writes the data, and the public encoders with random weights."""
    texts = made_data(folder)
    for field, public in ENCODERS[name].items():
        made = write_layout(public, folder / (public if field != "init" else f"{public}-public"), texts)
        if field == "init":
            convert(str(made), folder / public, layout="uniter_start")


def main(o: Options) -> None:
    rows = []
    for name in o.runs:
        with tempfile.TemporaryDirectory() as folder:
            # Each in a process of its own, so that memory is the run's alone.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(prepared, (name, Path(folder)))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(measure, (name, Path(folder), o.threads)))
        append(o.out, [stamp("cpu", "published_sizes.py") | {"threads": o.threads, "batch": BATCH} | rows[-1]])
    table = Table(title=f"steps of {BATCH} pairs, fp32")
    for column in ("run", "M parameters", "M trained", "tensors changed", "loss", "CPU s a step", "GB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        losses = " -> ".join(f"{losses['loss']:.2f}" for losses in row["losses"])
        table.add_row(
            row["run"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['trained'] / 1e6:.2f}",
            f"{row['changed']} of {row['tensors']}",
            losses,
            f"{min(row['step_cpu_s']):.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
