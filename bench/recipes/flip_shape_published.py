"""Arm `flip_shape_published` of docs/log.md, entry 33: the same towers in the published shape, with texts of 20 words."""

from dataclasses import replace

from flip_shape_clip import flip_shape_clip

from fastvlp.model.sizes import Tower, flip_published
from fastvlp.training.train_config import TrainConfig


def flip_shape_published() -> TrainConfig:
    model = flip_published(Tower(4, 96, 3), Tower(3, 96, 3), width=128, size=64, patch=8, length=20)
    return replace(flip_shape_clip(), name="flip_shape_published", model=model)
