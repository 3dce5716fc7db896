"""photo_flm with another objective."""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.mdc import MDCConfig
from fastvlp.training.train_config import TrainConfig


def photo_mdc() -> TrainConfig:
    run = photo_flm()
    return replace(run, name="photo_mdc", model=replace(run.model, reconstructor=None), objectives={"mdc": MDCConfig()})
