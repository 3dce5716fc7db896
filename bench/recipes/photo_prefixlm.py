"""photo_flm with another objective."""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.prefixlm import PrefixLMConfig
from fastvlp.training.train_config import TrainConfig


def photo_prefixlm() -> TrainConfig:
    run = photo_flm()
    return replace(
        run,
        name="photo_prefixlm",
        model=replace(run.model, reconstructor=None),
        objectives={"prefixlm": PrefixLMConfig()},
    )
