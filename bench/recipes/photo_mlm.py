"""photo_flm with another objective."""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.mlm import MLMConfig
from fastvlp.training.train_config import TrainConfig


def photo_mlm() -> TrainConfig:
    run = photo_flm()
    return replace(run, name="photo_mlm", model=replace(run.model, reconstructor=None), objectives={"mlm": MLMConfig()})
