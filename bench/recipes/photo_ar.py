"""photo_flm with another objective."""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.ar import ARConfig
from fastvlp.training.train_config import TrainConfig


def photo_ar() -> TrainConfig:
    run = photo_flm()
    return replace(run, name="photo_ar", model=replace(run.model, reconstructor=None), objectives={"ar": ARConfig()})
