"""Image-text matching on the map of a frozen CNN, to re-rank what heads have found:

R=bench/recipes
vlp pretrain $R/photo_itm.py --from RUN        # of photo_flm
"""

from dataclasses import replace

from photo_flm import photo_flm

from fastvlp.objectives.itm import ITMConfig
from fastvlp.training.train_config import TrainConfig


def photo_itm() -> TrainConfig:
    run = photo_flm()
    return replace(run, name="photo_itm", objectives={"itm": ITMConfig()}, steps=600, budget_s=None)
