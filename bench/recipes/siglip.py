"""Arm `siglip` of the towers compared in docs/log.md: the sigmoid loss on the towers and batches of clip.py."""

from dataclasses import replace

from clip import clip

from fastvlp.objectives.siglip import SigLIPConfig
from fastvlp.training.train_config import TrainConfig


def siglip() -> TrainConfig:
    return replace(clip(), name="siglip", objectives={"siglip": SigLIPConfig()})
