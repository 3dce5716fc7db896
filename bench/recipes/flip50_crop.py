"""Arm `flip50_crop` of the towers compared in docs/log.md: flip50.py with random crops of half to all of the image."""

from dataclasses import replace

from flip50 import flip50

from fastvlp.data.augment import AugmentConfig
from fastvlp.training.train_config import TrainConfig


def flip50_crop() -> TrainConfig:
    return replace(flip50(), name="flip50_crop", augment=AugmentConfig(crop=(0.5, 1.0)))
