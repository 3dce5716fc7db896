"""The same short fine-tuning for every model: how much its pretraining is worth to a task, in memory, nothing written."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Literal

import torch

from fastvlp.data.loader import Loader
from fastvlp.data.random import hash64
from fastvlp.data.rows import Split
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.model.image import ImageConfig
from fastvlp.model.model import Bos, Reading, VLModel
from fastvlp.tasks.task import ItemMaker
from fastvlp.tasks.vqa import VQA, VQAConfig, VQAData, measure
from fastvlp.train.optim import OptimConfig, adamw
from fastvlp.train.pretraining import Pretraining
from fastvlp.train.run import steps as train_steps
from fastvlp.train.state import TrainConfig, TrainState


# Probes of one comparison share their decoded images.
@lru_cache(maxsize=4)
def _made(data: VQAData, split: Split, tokenizer: Tokenizer, image: ImageConfig) -> ItemMaker | None:
    return data.maker(split, tokenizer, image, strict=split != "train")


def probe_vqa(
    model: VLModel,
    tokenizer: Tokenizer,
    reading: Reading,
    data: VQAData,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    *,
    bos: Bos = "blind",
    split: Split = "test",
    precision: Literal["fp32", "bf16"] = "bf16",
) -> dict[str, float]:
    """Fine-tunes a copy of `model` on questions for a fixed number of steps, and measures it on `split` (`vqa.measure`).

    Towers, fusion and head train at the one rate `lr`, the head at five times it, whatever the pretraining was. The model
    itself is not changed. Raises UserError where the data lacks a split.
    """
    made = {name: _made(data, name, tokenizer, model.config.image) for name in ("train", split)}
    train, held_out = made["train"], made[split]
    if train is None or held_out is None:
        raise UserError(f"the probe needs the splits train and {split}; name their folders with --data.train and so on")
    told = VQAConfig(reading=reading, bos=bos, answers=len(data.answers))
    device = next(model.parameters()).device
    torch.manual_seed(hash64(seed))
    pretraining = Pretraining(deepcopy(model), {"vqa": told.build(model.config, tokenizer)}).to(device)
    run = TrainConfig(
        name="probe",
        data=data,
        model=model.config,
        objectives={"vqa": told},
        optim=OptimConfig(lr=lr, cross_multiplier=1, head_multiplier=5, warmup=0.1),
        steps=steps,
        seed=seed,
        precision=precision,
    )
    state = TrainState(
        run=run,
        device=device,
        tokenizer=tokenizer,
        model=pretraining.model,
        pretraining=pretraining,
        wrapped=pretraining,
        optimiser=adamw(pretraining, run.optim),
        ema=None,
        train=Loader(len(train.items), train, batch_size=batch_size, seed=seed),
        val=None,
    )
    for _ in train_steps(state):
        pass
    objective = pretraining.objectives["vqa"]
    assert isinstance(objective, VQA)
    return measure(pretraining.model, objective, data.answers, held_out, 4 * batch_size)
