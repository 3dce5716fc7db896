"""A short run of each family of recipes on the embedded corpus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlp.data.world.corpus import WorldConfig, write_world
from fastvlp.model.sizes import flip_tiny
from fastvlp.objectives.moco import albef
from fastvlp.recipes import recipe
from fastvlp.training.loop import train
from fastvlp.training.train_config import TrainConfig

# What differs from the recipe of this name, so that it runs on the embedded corpus and shows what the test is about.
FAMILIES: dict[str, dict[str, Any]] = {
    "flm_demo": {},
    "mlm_demo": {"optim.clip": 0.5},
    "ar_demo": {},
    "prefixlm_demo": {},
    "cappa_demo": {"recompute": True},
    "mdc_demo": {},
    "flip_demo": {"ema": 0.5},
    "siglip_photos": {"model": flip_tiny()},
    "superclip_photos": {"model": flip_tiny()},
    "clip_simclr_demo": {},
    # Queues that are no whole number of steps: which keys are left depends on their order.
    "brivl_demo": {"data.queue": 36},
    "moco_photos": {"model": flip_tiny(), "objectives": {"moco": replace(albef(queue=20), momentum=0.9)}},
    "uniter_demo": {"data.max_tokens": 128},
}

# Those that are validated too: a loss of words, of pairs, and of pairs with a queue.
VALIDATED = ("flm_demo", "flip_demo", "brivl_demo")


def made_world(folder: Path) -> Path:
    write_world(folder, WorldConfig(size=32, captions=2), train=40, val=6, test=4, pairs=0, singles=0)
    return folder


def family_run(name: str, world: Path, out: Path, *, batch_size: int = 4, **changes: Any) -> TrainConfig:
    """Three steps whose rates do not depend on how many there are, on images of 2 x 2 patches, with one layer where there are
    several."""
    run, own = recipe(name), dict(FAMILIES[name])
    val = str(world / "val") if name in VALIDATED else None
    data = replace(run.data, train=str(world / "train"), val=val, batch_size=batch_size, cache=False)
    model = own.pop("model", run.model)
    if model.single is None:
        model = replace(model, image=replace(model.image, size=16, depth=1), text=model.text.with_depth(1))
    own["model"] = model
    if (budget := own.pop("data.max_tokens", None)) is not None:
        data = replace(data, max_tokens=budget, group=24)
    if (queue := own.pop("data.queue", None)) is not None:
        own["objectives"] = {"moco": replace(run.objectives["moco"], queue=queue)}
    # With a small eps Adam blows the rounding noise of gradients that are zero up to the size of a step.
    longest = own.pop("optim.clip", 10)
    optim = replace(run.optim, lr=1e-3, eps=1e-3, clip=longest, warmup=0, decay="constant")
    common = {"steps": 3, "budget_s": None, "vocab": 300, "validate_every": None, "checkpoint_every": None}
    common |= {"precision": "fp32", "device": "cpu", "threads": 1, "log_every": 1}
    return replace(run, **{**common, **own, **changes}, data=data, optim=optim, out=str(out / name))


def train_all(runs: Iterable[TrainConfig], resume: bool = False) -> None:
    for run in runs:
        train(run, resume=resume)
