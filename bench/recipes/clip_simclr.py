"""Arm `clip_simclr` of the towers compared in docs/log.md: CLIP and SimCLR, every view masked to half of its patches."""

from dataclasses import replace

from clip import clip

from fastvlp.data.augment import AugmentConfig
from fastvlp.objectives.simclr import NATURAL, SimCLRConfig
from fastvlp.training.train_config import TrainConfig


def clip_simclr() -> TrainConfig:
    run = clip()
    simclr = SimCLRConfig(augment=replace(NATURAL, sigma=(0.05, 1.0)), keep=0.5)
    augment = AugmentConfig(crop=(0.5, 1.0))
    return replace(run, name="clip_simclr", keep=0.5, augment=augment, objectives={**run.objectives, "simclr": simclr})
