"""photo_flm with another objective."""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.cappa import CapPaConfig
from fastvlp.training.train_config import TrainConfig


def photo_cappa() -> TrainConfig:
    run = photo_flm()
    return replace(
        run, name="photo_cappa", model=replace(run.model, reconstructor=None), objectives={"cappa": CapPaConfig()}
    )
