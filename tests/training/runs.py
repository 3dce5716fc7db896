"""A few made pairs in shards, and runs on them that take a second."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from PIL import Image

from fastvlp.batch import Record
from fastvlp.data.pairs import PairData
from fastvlp.data.records.shards import ShardWriter
from fastvlp.model.sizes import joint_space
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.flm import FLMConfig
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.objectives.moco import MoCoConfig, albef
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.objectives.simclr import SimCLRConfig
from fastvlp.training.checkpoint import save
from fastvlp.training.loop import start, steps
from fastvlp.training.optim import OptimConfig
from fastvlp.training.state import TrainState
from fastvlp.training.train_config import TrainConfig
from tests.made import made_config

WORDS = ["red", "blue", "green", "small", "large", "round", "left", "right", "above", "near", "far", "bright", "two"]
PAIRED = ("clip", "siglip", "simclr", "moco", "albef")
TOKENS = ("flm", "mlm", "prefixlm")
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "flm": FLMConfig(span_mode="uniform", span_rate=0.4),
    "mlm": MLMConfig(),
    "prefixlm": PrefixLMConfig(),
    "clip": CLIPConfig(),
    "siglip": SigLIPConfig(),
    "simclr": SimCLRConfig(width=8, keep=0.5),
    # A whole number of steps of 12 pairs, so that it does not matter in which order their keys are written.
    "moco": MoCoConfig(queue=24, momentum=0.9),
    "albef": replace(albef(queue=24), momentum=0.9),
}


def stopped_after(run: TrainConfig, count: int) -> None:
    """Trains so many steps, and saves the run as one that was stopped there."""
    state = start(run)
    running = steps(state)
    for _ in range(count):
        next(running)
    save(state)
    running.close()
    state.tokenizer.save(run.folder / "tokenizer.json")


def made_records(count: int, seed: int = 0) -> list[Record]:
    records = []
    for i in range(count):
        rng = Random(f"{seed}/{i}")
        file = io.BytesIO()
        Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3)).save(file, "PNG")
        captions = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2)]
        records.append(Record(key=f"r{i:03d}", images=(file.getvalue(),), info={"captions": captions}))
    return records


def made_pairs(folder: Path, count: int = 24, copies: bool = False) -> Path:
    """Shards of `count` pairs to train on and 6 to validate on. With `copies` a half of them share a caption with their
    neighbour, and two thirds the picture."""
    for split, number, seed in (("train", count, 0), ("val", 6, 1)):
        records = made_records(number, seed)
        if copies:
            records = [
                replace(
                    record,
                    info={"captions": records[i // 2 * 2].info["captions"][:1]} if i % 4 < 2 else record.info,
                    images=records[i // 3 * 3].images if i % 3 < 2 else record.images,
                )
                for i, record in enumerate(records)
            ]
        with ShardWriter(folder / split) as writer:
            for record in records:
                writer.write(record)
    return folder


def made_run(pairs: Path, out: Path, *objectives: str, dropout: float = 0.0, **changes) -> TrainConfig:
    """Six steps of 8 rows of a model of width 32. `batch_size`: rows of a micro-batch."""
    model = made_config(depth=1)
    layer = replace(model.text.layer, dropout=dropout)
    model = replace(
        model,
        text=replace(model.text, layer=layer),
        fusion=replace(model.fusion, layer=layer),
        reconstructor=replace(model.reconstructor, layer=layer),
        embed=joint_space(model, width=16) if {*objectives} & {*PAIRED} - {"simclr"} else None,
    )
    data = PairData(
        train=str(pairs / "train"),
        val=str(pairs / "val"),
        batch_size=changes.pop("batch_size", 8),
        max_length=16,
        workers=changes.pop("workers", 0),
    )
    run = TrainConfig(
        name="made",
        out=str(out),
        data=data,
        model=model,
        objectives={name: OBJECTIVES[name] for name in objectives or TOKENS},
        # With a small eps Adam blows the rounding noise of gradients that are zero up to the size of a step, and a tight
        # clip hides a gradient of the wrong scale.
        optim=OptimConfig(lr=1e-2, eps=1e-3, clip=10),
        vocab=60,
        steps=6,
        precision="fp32",
        device="cpu",
        log_every=1,
    )
    return replace(run, **changes)


# Largest difference of a weight after some steps whose sums are added up in another order, where it is above 1e-6 on some
# processors (1.06e-6 without AVX-512).
ROUNDING = 2e-6


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.pretraining.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
