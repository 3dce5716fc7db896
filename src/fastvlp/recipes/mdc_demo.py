"""Masked diffusion captioning (arXiv 2510.26799) on the embedded corpus: flm_demo with another objective.

    vlp data demo
    vlp pretrain mdc_demo

On the easy corpus beside FLM, MLM and AR, 60 CPU seconds each, three seeds: docs/log.md, entry 53.
"""

from dataclasses import replace

from fastvlp.model.sizes import tiny
from fastvlp.objectives.mdc import MDCConfig
from fastvlp.recipes.flm_demo import flm_demo
from fastvlp.training.train_config import TrainConfig


def mdc_demo() -> TrainConfig:
    return replace(flm_demo(), name="mdc_demo", model=tiny(reconstructor=False), objectives={"mdc": MDCConfig()})
