"""Masked language modeling (40 % of the words) on the embedded corpus: flm_demo with another objective.

vlp data demo
vlp pretrain mlm_demo

Its scores are beside those of flm_demo (docs/log.md, entry 14).
"""

from dataclasses import replace

from fastvlp.model.sizes import tiny
from fastvlp.objectives.mlm import MLMConfig
from fastvlp.recipes.flm_demo import flm_demo
from fastvlp.training.train_config import TrainConfig


def mlm_demo() -> TrainConfig:
    return replace(flm_demo(), name="mlm_demo", model=tiny(reconstructor=False), objectives={"mlm": MLMConfig()})
